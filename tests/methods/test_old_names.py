"""A method file of version 0.1, the example that CONTRIBUTING.md had then: it runs, and is told of the new names."""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from methods import load_method
from tests.methods.conftest import kept, run, tiny_llama

#: a cache of fixed size that drops the oldest token, in the words of then
OLDEST = """
from methods.core.capped import Capped

class Oldest(Capped):
    keeps_limit = True

    def voters(self, store, step):
        return 1

    def cap(self, n):
        return 8

    def worth(self, store, step, room, mass):
        assert room.flatten().tolist() == [8] and mass.shape[2] == store.pos.shape[2]
        return store.pos.float()
"""

#: a cache that counts its steps, in the words of then
COUNTING = """
from methods.core.eviction import Eviction, EvictionCache

class Counting(EvictionCache):
    steps = 0

    def take(self, step):
        self.store.append(step.k, step.v, step.pos, step.padded)

    def settle(self, step):
        self.steps += 1

class Count(Eviction):
    def caches(self, spec, prompt_len):
        return [Counting(self, prompt_len) for _ in range(spec.n_layers)]
"""

#: a store that rounds what it holds, in the words of then
ROUNDING = """
from methods.core.store import Store

class Rounding(Store):
    def settle(self, step):
        self.buffers["k"] = self.buffers["k"].round()

    def own(self, most=None):
        return [7 for _ in super().held_bytes(most)]
"""

KEEPNORM = '''"""KeepNorm: keep the prompt slots whose values are longest.

Paper: none; this is the example of CONTRIBUTING.md.
Idea:  a slot with a short value vector adds little to any output, whatever attends to it. When the prompt ends, each
       KV head keeps the slots whose values have the largest norm, and the newest `recent` slots.
Here:  nothing to depart from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.core.contract import Step
from methods.core.errors import UserError
from methods.core.eviction import Cut, Eviction
from methods.core.store import Store


@dataclass
class KeepNorm(Eviction):
    """Drop prompt slots once, by the norm of their values.

    recent: newest slots that are kept whatever their norm; tokens.
    """

    recent: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 0:
            raise UserError(f"KeepNorm: method.recent={self.recent}; give a number of tokens, 0 or more")

    def score(self, store: Store, step: Step, cut: Cut) -> Tensor:
        """Norms per slot, [B, H, S], float32; higher is kept."""
        _, v = store.read()  # [B, H, S, D]
        return v.float().norm(dim=-1).masked_fill(cut.rank >= cut.n - self.recent, torch.inf)  # [B, H, S]
'''


def loaded(text: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a file with this text, run."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_a_method_with_the_old_names_runs_and_says_so_in_one_line(tmp_path: Path, monkeypatch):
    model, ids = tiny_llama(), torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        module = loaded(KEEPNORM, tmp_path / "keepnorm_of_then.py", monkeypatch)
        cache = module.KeepNorm(budget=0.5, recent=4).cache_for(model)
        run(model, cache, ids, new=ids[:, :2])
    told = [str(one.message) for one in said if "EvictionContext" in str(one.message)]
    assert told == [
        "methods.core.eviction.Cut is EvictionContext now, and its `rank` is `age_rank`; the old names will go"
    ]
    # the newest four of the prompt stay whatever their norm, which the old name of their age decides
    assert all({36, 37, 38, 39} <= set(kept(cache, layer, 0, head)) for layer in range(2) for head in range(2))
    assert len(kept(cache)) < 42


def test_what_a_subclass_fills_in_by_its_old_name_is_called_and_told_in_one_line_per_class(tmp_path: Path, monkeypatch):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        module = loaded(COUNTING, tmp_path / "counting_of_then.py", monkeypatch)
    (told,) = said
    assert str(told.message) == (
        "counting_of_then.Counting: `take` is `append`, `settle` is `end_step` now; the old names will go"
    )
    assert told.filename.endswith("counting_of_then.py") and told.category is FutureWarning
    model, ids = tiny_llama(), torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = module.Count().cache_for(model)
    run(model, cache, ids, new=ids[:, :2])
    assert [layer.inner.steps for layer in cache.layers] == [3, 3]
    assert kept(cache) == [*range(14)]


def test_a_capped_method_with_the_old_names_decides_as_before(tmp_path: Path, monkeypatch):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        module = loaded(OLDEST, tmp_path / "oldest_of_then.py", monkeypatch)
    (told,) = said
    assert str(told.message) == (
        "oldest_of_then.Oldest: `voters` is `n_window_queries`, `keeps_limit` is `fills_budget`, `worth` is `score`, "
        "`cap` is `capacity` now; the old names will go"
    )
    model, ids = tiny_llama(), torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = module.Oldest(budget=8).cache_for(model)
    run(model, cache, ids, new=ids[:, :2])
    assert kept(cache) == [*range(6, 14)]


def test_a_store_with_the_old_names_packs_and_counts_as_before(tmp_path: Path, monkeypatch):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        module = loaded(ROUNDING, tmp_path / "rounding_of_then.py", monkeypatch)
    (told,) = said
    assert str(told.message) == (
        "rounding_of_then.Rounding: `settle` is `pack`, `own` is `held_bytes` now; the old names will go"
    )
    model, ids = tiny_llama(), torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = load_method("snapkv", budget=1.0)
    cache.store = module.Rounding
    cache = cache.cache_for(model)
    run(model, cache, ids)
    for layer in cache.layers:
        k = layer.inner.store.k
        assert torch.equal(k, k.round()) and layer.inner.held_bytes() == [7]
