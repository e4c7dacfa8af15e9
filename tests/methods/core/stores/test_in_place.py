"""Slots that go while decoding: in place, also in heads that hold different numbers, and the method is told."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import attend, compiled, top
from methods import load_method
from methods.adakv import AdaKV
from methods.core.capped import Capped
from methods.core.contract import Stage, Step
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.meter import nbytes
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from tests.bounds import bound, near
from tests.methods.layer import Spec, step_of
from tests.waiting import NoCopies

H, HQ, D, PROMPT, STEPS = 2, 4, 32, 300, 256
SLOT = 2 * D * 4 + 4 + 4 + 2 * 4  # key and value, position, where it lies, and two sums


class Collects:
    """Ranks slots by the squared attention and by the attention that they have collected."""

    def n_window_queries(self, store: Store, step: Step) -> int:
        return 1 if step.stage is Stage.DECODE else min(8, step.q.shape[2])

    def observe(self, store: Store, step: Step, mass: Tensor) -> None:
        of_head = mass.view(*store.pos.shape[:2], -1, mass.shape[-1])  # [B, H, G, S]
        store.add("mass", of_head.sum(2))
        store.add("squares", of_head.square().sum(2))

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return (store.track("squares") + store.track("mass")).masked_fill(
            store.pos == step.pos[:, -1:, None], torch.inf
        )


@dataclass
class OneEach(Collects, Capped):
    """Each head drops a slot per token."""


@dataclass
class Every16(Collects, Eviction):
    """Heads drop down to their parts of the budget, which change, once in 16 tokens."""

    interval = 16


class Gathers(RaggedStore):
    """Makes a rectangle for every token and everything anew at every cut."""

    def keep(self, mask: Tensor, n: int, exact: bool = False) -> None:
        if self.counts:
            self.buffers = {name: self._whole(name, self._fill(name)) for name in self.buffers}
            self.n, self.pages, self.counts = mask.shape[2], {}, []
        super().keep(mask, n, exact)

    def attend(self, step: Step) -> Tensor:
        return attend(step.q, *self.read(), step.rules, q_pos=step.pos, k_pos=self.pos)

    def attend_with_mass(self, step: Step, n: int) -> tuple[Tensor, Tensor]:
        return Store.attend_with_mass(self, step, n)


def token(i: int) -> Step:
    """The i-th decoded one, unlike the others."""
    step = step_of(1, HQ, H, D, stage=Stage.DECODE, start=PROMPT + i)
    g = torch.Generator().manual_seed(i)
    step.q, step.k, step.v = (torch.randn(x.shape, generator=g) for x in (step.q * 3, step.k, step.v))
    return step


def taken_in(layer: EvictionCache, step: Step) -> Tensor:
    layer.append(step)
    out = layer.attend(step)
    layer.end_step(step)
    return out


def held(layer: EvictionCache) -> list[list[int]]:
    """Positions of every head's slots."""
    return [sorted(pos[pos >= 0].tolist()) for pos in layer.store.pos[0]]


@pytest.mark.skipif(compiled._compiler() is None, reason="gathers in PyTorch")
@pytest.mark.parametrize("kind", [OneEach, Every16])
def test_256_tokens_make_no_tensor_of_the_caches_size_and_keep_what_a_store_that_gathers_keeps(kind):
    ours, plain = (kind(0.5, allocator=AdaKV(), store=store) for store in (RaggedStore, Gathers))
    (layer,), (expected,) = (method.caches(Spec(), None) for method in (ours, plain))
    prompt = step_of(PROMPT, HQ, H, D)
    prompt.k[:, 1] *= 2  # one head attends to less, and more to it
    taken_in(layer, prompt), taken_in(expected, replace(prompt, memo={}))
    assert abs(layer.store.counts[0] - layer.store.counts[1]) > 40 and sum(layer.store.counts) == PROMPT
    splits = set()
    # the first steps make room for the tokens to come
    for i in range(20):
        taken_in(layer, token(i)), taken_in(expected, token(i))
    where = {name: x.data_ptr() for name, x in layer.store.pages.items()}
    for i in range(20, 20 + STEPS):
        with NoCopies(limit=layer.store.pages["k"].nbytes // 2):
            out = taken_in(layer, token(i))
        near(out, taken_in(expected, token(i)), bound(torch.float32, PROMPT, logit=40.0, size=6.0, width=D))
        assert held(layer) == held(expected)
        assert where == {name: x.data_ptr() for name, x in layer.store.pages.items()}
        holding, slots = layer.store.holding(), sum(map(len, held(layer)))
        # what came since the last cut is in no table yet, and its positions are held once for all heads
        new = slots - sum(layer.store.counts)
        assert holding.held == [slots * SLOT - new * 4 - (new - new // H) * 4 * (kind is Every16) + 16 * H]
        assert holding.held[0] + holding.padding[0] == nbytes(layer.store.tensors())
        assert holding.padding[0] <= max(slots // 8, 2 * H) * SLOT
        splits.add(tuple(layer.store.counts))
    assert len(splits) > 4 or kind is OneEach


@pytest.mark.skipif(compiled._compiler() is None, reason="gathers in PyTorch")
@pytest.mark.parametrize("name", ["h2o", "keyformer", "tova"])
def test_methods_that_rank_by_attention_read_slots_of_uneven_heads_once_where_they_lie(name, monkeypatch):
    knobs = {"tova": {"granularity": "kv_head"}}.get(name, {})
    method = replace(load_method(name, budget=0.5, **knobs), allocator=AdaKV())
    (layer,) = method.caches(Spec(), None)
    taken_in(layer, step_of(PROMPT, HQ, H, D))
    taken_in(layer, token(0)), taken_in(layer, token(1))
    assert layer.store.counts
    total = sum(map(len, held(layer)))
    for gathers in ("read", "mass"):
        monkeypatch.setattr(RaggedStore, gathers, None)  # it would be called in vain
    for i in range(2, 6):
        with NoCopies(limit=layer.store.pages["k"].nbytes // 2):
            taken_in(layer, token(i))
        assert sum(map(len, held(layer))) == total


WIDTHS, SINKS = (40, 260), 4


@dataclass
class Windows(AdaKV):
    """As many slots as each head's window, whatever the scores."""

    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        assert (n * H == sum(WIDTHS)).all()
        return top(scores, torch.tensor(WIDTHS).expand(len(n), -1))


@dataclass
class Rings(Capped):
    """Each head keeps the first tokens and the newest of a window of its own."""

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return store.pos.float().masked_fill(store.pos < SINKS, torch.inf)


@pytest.mark.skipif(compiled._compiler() is None, reason="gathers in PyTorch")
def test_windows_of_heads_are_rings_whose_oldest_slot_the_next_token_takes():
    (layer,) = Rings(0.5, allocator=Windows()).caches(Spec(), None)
    taken_in(layer, step_of(PROMPT, HQ, H, D))
    taken_in(layer, token(0)), taken_in(layer, token(1))
    where = {name: x.data_ptr() for name, x in layer.store.pages.items()}
    for i in range(2, 300):
        with NoCopies(limit=layer.store.pages["k"].nbytes // 2):
            taken_in(layer, token(i))
        newest = PROMPT + i
        assert held(layer) == [[*range(SINKS), *range(newest + 1 - w + SINKS, newest + 1)] for w in WIDTHS]
        assert where == {name: x.data_ptr() for name, x in layer.store.pages.items()}
    k = layer.store.read()[0]
    latest = (layer.store.pos == newest).nonzero()
    assert latest[:, 1].tolist() == list(range(H))
    for b, h, slot in latest.tolist():
        assert torch.equal(k[b, h, slot], token(i).k[b, h, 0])


@dataclass
class WholeAndWindow(AdaKV):
    """The first head keeps everything, the second its newest slots."""

    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        real = scores > -torch.inf
        newest = real.flip(-1).cumsum(-1).flip(-1) <= WIDTHS[0]
        return real & (newest | (torch.arange(H) == 0)[:, None])


@dataclass
class Policies(Eviction):
    """Heads follow policies of their own, once in 16 tokens."""

    interval = 16

    def again(self, n: int, held: int) -> int:
        return held - 1

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return store.pos.float()


@pytest.mark.skipif(compiled._compiler() is None, reason="gathers in PyTorch")
def test_a_head_that_keeps_everything_grows_into_the_places_of_one_that_has_a_window():
    (layer,) = Policies(0.5, allocator=WholeAndWindow()).caches(Spec(), None)
    taken_in(layer, step_of(PROMPT, HQ, H, D))
    made = set()
    for i in range(160):
        taken_in(layer, token(i))
        new = (i + 1) % 16  # since the last cut
        window = list(range(PROMPT + i + 1 - WIDTHS[0] - new, PROMPT + i + 1))
        assert held(layer) == [list(range(PROMPT + i + 1)), window]
        made.add(layer.store.pages["k"].data_ptr())
        spare = len(layer.store.pages["pos"]) - sum(layer.store.counts)
        assert spare <= sum(layer.store.counts) // 8
    # 160 slots more than at first: an eighth at a time
    assert len(made) <= 5


class Weighs:
    """Every slot weighs 1 at first, and takes on the weight of what goes in its favour: the newest that stays."""

    def before_drop(self, store: Store, keep: Tensor) -> None:
        weight = store.track("weight", 1.0)
        goes = weight.masked_fill(keep | (store.pos < 0), 0.0).sum(-1, keepdim=True)  # [B, H, 1]
        newest = store.pos.masked_fill(~keep, -1).argmax(-1, keepdim=True)
        store.add("weight", torch.zeros_like(weight).scatter(2, newest, goes))


class PlainSpec(Spec):
    ropes = (None,)


@pytest.mark.parametrize("store", [Store, RaggedStore])
@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm", "nacl", "scissorhands"])
def test_what_goes_while_decoding_is_told_before_it_goes(name, store):
    """So that nothing is lost of what a method merges: weights sum up to the tokens that came in."""
    kind = type(load_method(name))
    weighing = type(kind.__name__, (Weighs, kind), {})
    knobs = {"nacl": {"decode_interval": 4}, "streaming_llm": {"positions": "original"}}.get(name, {})
    (layer,) = weighing(budget=0.5, store=partial(store), **knobs).caches(PlainSpec(), None)
    taken_in(layer, step_of(40, HQ, H, D))
    for i in range(12):
        step = token(i)
        step.pos = torch.tensor([[40 + i]], dtype=torch.int32)
        taken_in(layer, step)
        weight = layer.store.track("weight", 1.0).masked_fill(layer.store.pos < 0, 0.0)
        assert weight.sum(-1).tolist() == [[41.0 + i] * H]
        assert max(map(len, held(layer))) <= 25
