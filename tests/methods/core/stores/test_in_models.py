"""Methods on segments, chains and slots that weigh, as users run them: alone and shared, in turns, beams, 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from methods import load_method
from methods.core.contract import Method, Step
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from runners.engine.session import Session
from runners.engine.shared_prefill import Group
from tests.bounds import near, run_off
from tests.methods.core.stores.test_chained import Chained
from tests.methods.core.stores.test_segments import Packs
from tests.tiny import tiny_model

N, TURN = 40, 9


@dataclass
class Merges(Eviction):
    """What is dropped goes on in the newest slot that stays: it weighs as many as they did, its value a tenth less."""

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return store.read()[0].float().norm(dim=-1)

    def before_drop(self, store: Store, keep: Tensor) -> None:
        bias, real = store.track("logit_bias"), store.pos >= 0
        goes = bias.exp().masked_fill(keep | ~real, 0.0).sum(-1, keepdim=True)
        newest = store.pos.masked_fill(~keep, -1).argmax(-1, keepdim=True)
        old = bias.gather(2, newest)
        store.add("logit_bias", torch.zeros_like(bias).scatter(2, newest, (old.exp() + goes).log() - old))
        factor = store.track("value_factor")
        store.add("value_factor", torch.zeros_like(factor).scatter(2, newest, -0.1))


METHODS: dict[str, Callable[[], Method]] = {
    "segments": Packs,
    "chain": Chained,
    "weights": lambda: Merges(budget=0.5),
    "ragged weights": lambda: Merges(budget=0.5, store=RaggedStore),
    "full": lambda: load_method("full"),
}
model_of = cache(tiny_model)


def tokens(n: int, seed: int, rows: int = 2) -> Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def talk(session: Session | Group, rows: slice = slice(0, 2)) -> list[Tensor]:
    """Logits after a turn, a second prompt that is compressed too, and tokens one by one, which flush and pack."""
    turn, second = tokens(TURN, 2)[rows], tokens(N // 2, 3)[rows]
    out = [session.run(tokens(1, 4 + i)[rows], every=True) for i in range(4)]
    out.append(session.run(turn, every=True))
    out.append(session.run(second, ends_prompt=True, every=True))
    return out + [session.run(tokens(1, 20 + i)[rows], every=True) for i in range(9)]


@cache
@torch.inference_mode()
def alone(model: str, name: str, row: int | None = None, dtype: str | None = None) -> list[Tensor]:
    """The logits of both rows, or of one of them by itself."""
    rows = slice(0, 2) if row is None else slice(row, row + 1)
    samples = list(range(2))[rows]
    own = METHODS[name]().cache_for(model_of(model), samples=samples, dtype=dtype)
    session = Session(model_of(model), own, len(samples))
    session.run(tokens(N, 1)[rows])
    return talk(session, rows)


@torch.inference_mode()
@pytest.mark.parametrize("model", ["llama", "mistral", "gpt2"])
def test_members_of_a_group_talk_as_they_do_alone(model):
    group, _ = Group.begin(
        model_of(model), [make() for make in METHODS.values()], [0, 1], lambda s: s.run(tokens(N, 1))
    )
    together = talk(group)
    assert all(member.error is None for member in group.members)
    for i, name in enumerate(METHODS):
        for ours, theirs in zip(together, alone(model, name), strict=True):
            near(ours[2 * i : 2 * i + 2], theirs, run_off(theirs))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in METHODS if name != "full"), ("segments", "bfloat16"), ("weights", "bfloat16")],
)
def test_a_row_talks_beside_others_as_it_does_alone(name, dtype):
    both = alone("llama", name, dtype=dtype)
    for row in range(2):
        one = slice(row, row + 1)
        for ours, theirs in zip(both, alone("llama", name, row, dtype), strict=True):
            near(ours[one], theirs, run_off(theirs))
    full = alone("llama", "full", dtype=dtype)
    assert max((a - b).abs().max().item() for a, b in zip(both, full)) > 2 * run_off(full[-1])


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_beams_of_a_batch_are_those_of_each_prompt(name):
    model, ids = model_of("llama"), tokens(N, 1)
    how = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(ids, past_key_values=METHODS[name]().cache_for(model, samples=[0, 0, 0, 1, 1, 1]), **how)
    for row in range(2):
        one = METHODS[name]().cache_for(model, samples=[row] * 3)
        assert torch.equal(model.generate(ids[row : row + 1], past_key_values=one, **how)[0], both[row])
