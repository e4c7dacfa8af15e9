"""A decode step of every method asks nothing of the device: the host runs ahead of it, and a CUDA graph can hold it."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from kernels import backend
from kernels.launch import noting
from methods import load_method
from methods.adakv import AdaKV
from methods.core.cache import BINDING, KVCache
from methods.core.contract import Method
from tests.kernels.both_forms import using
from tests.methods.conftest import run
from tests.tiny import METHODS, SIZES
from tests.turns import taking_turns
from tests.waiting import no_waiting, without_contents

pytest.importorskip("triton")

LENGTHS = (90, 35, 75)
STEPS = 2  # the first may still find a free place; the second drops as every later one does

#: beyond the methods as they are configured: what a decode step of theirs may do besides
KNOBS = {
    "h2o, normalised": ("h2o", {"normalise": True}),
    "keyformer, one noise per token": ("keyformer", {"noise": "per_token"}),
    "keyformer, without noise": ("keyformer", {"noise": "none"}),
    "keyformer, shared": ("keyformer", {"shared": True}),
    "lococo, sums": ("lococo", {"accumulate_scores": True}),
    "scissorhands, ties": ("scissorhands", {"tie": "prob"}),
    "streaming_llm, original positions": ("streaming_llm", {"positions": "original"}),
    "tova, by head": ("tova", {"granularity": "kv_head"}),
}
# What waits all the same: a sliding layer lets go of slots once in 64 tokens, and counts them where rows have padding
# or have dropped some; nacl with a decode_interval counts what it has drawn whenever that has passed.
WAITED = (AssertionError, NotImplementedError, RuntimeError)
#: ways to ask a device for a number, or to send it one
ASKED = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool(x.all()),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "numbers of the host": lambda x: torch.tensor([1, 2], device=x.device),
    "mask as index": lambda x: x[x > 0],
    "written by mask": lambda x: x.index_put_((x > 0,), x),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
}
DROPPING_MANY = ("scissorhands", "streaming_llm")
RAGGED = "h2o, heads apart"  # every head drops from pages of its own
CASES = {name: (name, {}) for name in METHODS} | KNOBS | {RAGGED: ("h2o", {})}


def made(case: str, budget: float) -> Method:
    name, knobs = CASES[case]
    if case == RAGGED:
        budget = min(budget, 0.3)  # it takes a share only
    method = load_method(name, **({} if name == "full" else {"budget": budget}), **SIZES.get(name, {}), **knobs)
    return replace(method, allocator=AdaKV()) if case == RAGGED else method


def prompted(method: Method, model: PreTrainedModel, lengths: tuple[int, ...]) -> KVCache:
    """A cache after a batch of prompts and two tokens."""
    cache, g = method.cache_for(model), torch.Generator().manual_seed(1)
    ids, new = (torch.randint(1, 97, (len(lengths), n), generator=g) for n in (max(lengths), 2))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    run(model, cache, ids, new=new, mask=mask.long())
    return cache


def copied(model: PreTrainedModel, cache: KVCache) -> tuple[PreTrainedModel, KVCache]:
    """Both without contents, and the cache as one of this model's; of its layers what attends, all else costs time."""
    model, cache = without_contents((model, cache))
    model.lm_head = torch.nn.Identity()
    for layer in model.model.layers:
        layer.mlp = layer.post_attention_layernorm = torch.nn.Identity()
    cache.passes = weakref.ref(model.__dict__[BINDING]["passes"])
    return model, cache


@torch.no_grad()
def decode(model: PreTrainedModel, cache: KVCache, steps: int) -> None:
    """Tokens without contents, one after the other."""
    rows = cache.samples.shape[0]
    one = torch.ones(rows, 1, dtype=torch.long, device="meta")
    for _ in range(steps):
        seen = torch.ones(rows, cache.get_seq_length() + 1, dtype=torch.long, device="meta")
        with noting(), no_waiting():
            model(one, attention_mask=seen, position_ids=one, past_key_values=cache, use_cache=True)


@pytest.fixture(scope="module")
def sliding(equipped: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return equipped("mistral")


@pytest.fixture(autouse=True)
def triton_anywhere(monkeypatch):
    monkeypatch.setattr(backend, "_trouble", lambda device, interpreted: None)


@pytest.mark.parametrize(
    ("case", "form"), taking_turns(list(CASES), [("triton", 0.5, STEPS), ("reference", 40, 4)], of=2)
)
def test_rows_of_different_lengths_decode_without_waiting(case, form, gqa):
    form, budget, steps = form
    prompt = prompted(made(case, budget), gqa, LENGTHS)
    with using(form):  # at 40 slots the shortest row fills up after three; a full scissorhands drops many
        decode(*copied(gqa, prompt), steps=12 if CASES[case][0] in DROPPING_MANY else steps)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_come_into_a_16_bit_cache_without_waiting(name, gqa):
    prompt = prompted(made(name, 0.5).holding_in("float16"), gqa, LENGTHS)
    with using("triton"):
        decode(*copied(gqa, prompt), STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_sliding_layers_decode_without_waiting(name, sliding):
    prompt = prompted(made(name, 40), sliding, LENGTHS)
    with using("triton"):
        decode(*copied(sliding, prompt), STEPS)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_one_length_drop_as_many_slots_as_they_like_without_waiting(case, gqa):
    prompt = prompted(made(case, 40), gqa, (60, 60))
    with using("triton"):
        decode(*copied(gqa, prompt), steps=30 if "scissorhands" in case else STEPS)


@pytest.mark.parametrize("ask", ASKED, ids=ASKED)
def test_what_waits_is_noticed(ask):
    x = without_contents(torch.ones(3))
    with pytest.raises(WAITED), no_waiting():
        ASKED[ask](x)
