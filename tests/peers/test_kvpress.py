"""Our kept slots and logits beside those of kvpress, which `make peers` recorded in data/.

Where a convention differs, ours is set to the peer's by its knobs. What no knob reaches:
- H2O and StreamingLLM go on dropping while they decode; the peer's attention scores stop at the prompt, and its sinks
  are its first slots, which it does not keep in order. The forced tokens come as one piece here, so that nothing is
  dropped between them; the peer reads them one by one.
- The peer's AdaKV counts the window into the share of slots that every head is sure of. It was asked with the share
  that leaves the same floor beside the window.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.contract import Method, Step
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store
from tests.bounds import near, run_off
from tests.methods.conftest import kept, run

DATA = Path(__file__).resolve().parent / "data"
ARCHITECTURES = ("llama", "qwen3")
BUDGETS = (0.5, 0.25, 0.125)
WINDOW = 8


class KeyNorm(Eviction):
    """Keeps the shortest keys: no more than the shared loop and a score."""

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return -store.read()[0].norm(dim=-1)


# ours, at the peer's conventions: budget, the inputs' folder -> method
OURS: dict[str, Callable[[float, Path], Method]] = {
    # the release's pooling instead of the paper's
    "snapkv": lambda budget, _: load_method("snapkv", budget=budget, window=WINDOW, kernel=5, pooling="avg"),
    # keys stay where they were rotated to
    "streaming_llm": lambda budget, _: load_method("streaming_llm", budget=budget, positions="original"),
    # attention per query that saw the slot, and no recent half
    "observed_attention": lambda budget, _: load_method("h2o", budget=budget, heavy=1.0, normalise=True),
    "knorm": lambda budget, _: KeyNorm(budget=budget),
    "qfilters": lambda budget, at: load_method("qfilters", budget=budget, filters=str(at / "filters.safetensors")),
    # no slot is safe, not even the newest
    "qfilters_capped": lambda budget, at: load_method(
        "qfilters_capped", budget=budget, filters=str(at / "filters.safetensors"), window=0
    ),
    "adakv": lambda budget, _: load_method(
        "adakv", budget=budget, window=WINDOW, kernel=5, pooling="avg", allocator={"alpha": 0.2, "safeguard": "reserve"}
    ),
}
IN_ONE_PIECE = {"streaming_llm", "observed_attention"}
CASES = [(name, budget, kind) for name in OURS for budget in BUDGETS for kind in ARCHITECTURES]


@cache
def model_of(architecture: str):
    return AutoModelForCausalLM.from_pretrained(DATA / architecture, dtype=torch.float32).eval()


def tokens_of(architecture: str) -> tuple[Tensor, Tensor]:
    tokens = json.loads((DATA / architecture / "tokens.json").read_text())
    return torch.tensor([tokens["prompt"]]), torch.tensor([tokens["forced"]])


@torch.no_grad()
def answers(method: Method, architecture: str, piece: bool) -> tuple[Tensor, Tensor]:
    """Slots kept [L, H, S], bool, and logits [N, V] of the forced tokens, in one piece or one by one."""
    model, (prompt, forced) = model_of(architecture), tokens_of(architecture)
    cache, n = method.cache_for(model), prompt.shape[1]
    run(model, cache, prompt)
    keep = torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads, n, dtype=torch.bool)
    for layer, heads in enumerate(keep):
        for head, slots in enumerate(heads):
            slots[kept(cache, layer, 0, head)] = True
    pos, logits = torch.arange(n, n + forced.shape[1])[None], []
    for at in pos.split(forced.shape[1] if piece else 1, dim=1):
        logits.append(model(forced[:, at[0] - n], position_ids=at, past_key_values=cache, use_cache=True).logits[0])
    return keep, torch.cat(logits)


@pytest.mark.parametrize(("name", "budget", "architecture"), CASES)
def test_the_same_slots_are_kept_and_the_logits_agree(name, budget, architecture):
    theirs = load_file(DATA / architecture / "kvpress.safetensors")
    keep, logits = answers(OURS[name](budget, DATA / architecture), architecture, piece=name in IN_ONE_PIECE)
    assert torch.equal(keep, theirs[f"{name}.{budget}.kept"])
    near(logits, theirs[f"{name}.{budget}.logits"], run_off(logits))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_recorded_answers_belong_to_the_recorded_inputs(architecture):
    folder = DATA / architecture
    names = ("config.json", "model.safetensors", "tokens.json", "filters.safetensors")
    with safe_open(folder / "kvpress.safetensors", "pt") as recorded:
        facts = json.loads(recorded.metadata()["facts"])
    assert facts["inputs"] == hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    assert facts["kvpress"] and facts["transformers"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conventions_matter_to_what_is_compared(architecture):
    theirs = load_file(DATA / architecture / "kvpress.safetensors")
    # the paper's H2O keeps a recent half and adds attention up; the paper's SnapKV takes the maximum of neighbours
    for name, method in (
        ("observed_attention", load_method("h2o", budget=0.25)),
        ("snapkv", load_method("snapkv", budget=0.25, window=WINDOW)),
    ):
        keep, _ = answers(method, architecture, piece=True)
        assert keep.sum() == theirs[f"{name}.0.25.kept"].sum()
        assert not torch.equal(keep, theirs[f"{name}.0.25.kept"])
    # numbering positions inside the cache keeps the same slots and gives other logits
    keep, logits = answers(load_method("streaming_llm", budget=0.25), architecture, piece=True)
    assert torch.equal(keep, theirs["streaming_llm.0.25.kept"])
    assert (logits - theirs["streaming_llm.0.25.logits"]).abs().max() > 1e-2
