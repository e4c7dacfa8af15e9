"""Layers that decide together, read each other, or hold something in common: alone, in groups, forked, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import attend
from methods import load_method
from methods.core.contract import LayerCache, Method, ModelSpec, SharedState, Stage, Step
from methods.core.store import Store
from runners.engine.shared_prefill import Group
from tests.bounds import near, run_off
from tests.tiny import feed, padded_prompt, tiny_model

N, LAYERS = 40, 2
FIRST = 0.9  # of the slots of both layers are the first one's


class Ranked(LayerCache):
    """Slots of one layer, which are cut when all layers have been seen."""

    def __init__(self) -> None:
        self.store = Store()

    def append(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)

    def attend(self, step: Step) -> Tensor:
        return self.store.attend(step)

    def end_step(self, step: Step) -> None:
        score = self.store.k.norm(dim=-1)  # [B, H, S]
        # the first layer is ranked above the second, whatever its keys are
        self.scratch["score"] = (score + (1000.0 if step.layer == 0 else 0.0)).masked_fill(
            self.store.pos < 0, -torch.inf
        )

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)


@dataclass
class Ranking(Method):
    """Half of all slots, ranked over all layers at once but for a tenth that every layer keeps."""

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [Ranked() for _ in range(spec.n_layers)]

    def end_pass(self, caches: Sequence[LayerCache], step: Step) -> None:
        if step.stage is not Stage.ENDS_PROMPT:
            return
        scores = torch.stack([cache.scratch["score"] for cache in caches])  # [L, B, H, S]
        real = torch.isfinite(scores).sum(-1)  # [L, B, H]
        least = (real * self.budget * (1 - FIRST) * 2).long()  # of every layer
        own = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        scores = scores.masked_fill(own < least[..., None], torch.inf)
        flat = scores.permute(1, 2, 0, 3).flatten(2)  # [B, H, L * S]
        budget = (real.sum(0) * self.budget).long()  # [B, H]
        keep = flat.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < budget[..., None]
        keep = keep.unflatten(-1, (len(caches), -1)).permute(2, 0, 1, 3)
        for cache, mask in zip(caches, keep, strict=True):
            cache.store.keep(mask, int(mask.sum(-1).max()))


class Pair(SharedState):
    """What two layers of a pair hold: the keys and values of the lower one, by pair."""

    def __init__(self) -> None:
        self.store = Store()
        self.turned = 0  # how often rows changed places

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def reorder(self, rows: Tensor) -> None:
        self.turned += 1
        self.store.reorder(rows)


class Half(LayerCache):
    """One layer of a pair; the upper one stores nothing and attends to what the lower one stored."""

    def __init__(self, pair: Pair):
        self.pair = pair

    def append(self, step: Step) -> None:
        if step.layer % 2 == 0:
            self.pair.store.append(step.k, step.v, step.pos, step.padded)

    def attend(self, step: Step) -> Tensor:
        return self.pair.store.attend(step)

    def tensors(self) -> Iterable[Tensor]:
        return self.pair.tensors()

    def shares(self) -> Iterable[SharedState]:
        return [self.pair]

    def reorder(self, rows: Tensor) -> None:
        """Nothing of its own."""


@dataclass
class Pairs(Method):
    """Layers in pairs that hold the lower one's keys and values."""

    changes_prompt = True

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        pairs = [Pair() for _ in range(spec.n_layers // 2)]
        return [Half(pairs[i // 2]) for i in range(spec.n_layers)]


class Above(LayerCache):
    """Nothing of its own: it reads the layer below it, which holds everything."""

    def __init__(self, layer: int):
        self.layer, self.store = layer, Store()

    def append(self, step: Step) -> None:
        if self.layer == 0:
            self.store.append(step.k, step.v, step.pos, step.padded)
            self.scratch["keys"] = step.k

    def attend(self, step: Step) -> Tensor:
        store = self.store if self.layer == 0 else self.below(0).store
        if self.layer:
            assert self.below(0).scratch["keys"].shape == step.k.shape
        return attend(step.q, *store.read(), step.rules, q_pos=step.pos, k_pos=store.pos)

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)


@dataclass
class Reading(Method):
    """The upper layer attends to the lower one's slots."""

    changes_prompt = True

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [Above(i) for i in range(spec.n_layers)]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("pieces", [(N,), (15, 25)])
def test_a_ranking_over_all_layers_gives_one_layer_nine_tenths_of_the_slots(llama, pieces):
    ids, mask = padded_prompt([N, N])
    cache = Ranking(budget=0.5).cache_for(llama, prompt_len=N if len(pieces) > 1 else None)
    feed(llama, cache, ids, mask, pieces)
    report = cache.report()  # read after the decision
    assert report.per_layer == [9 * report.held_prompt // 10, report.held_prompt // 10]
    assert len(cache.layers[0].inner.store) == 36
    assert all(not layer.inner.scratch for layer in cache.layers)
    assert report.workspace == LAYERS * 2 * N * 2 * 4 and report.peak_prompt >= report.full_prompt


def test_what_waits_for_the_end_of_a_pass_is_a_rows_own_workspace_whatever_pads_it(llama):
    lengths, alone = (N, 23, 31), []
    ids, mask = padded_prompt(list(lengths))
    for row, n in enumerate(lengths):
        cache = Ranking(budget=0.5).cache_for(llama)
        feed(llama, cache, ids[row : row + 1, N - n :], mask[row : row + 1, N - n :], (n,))
        alone.append(cache.report().workspace)
    cache = Ranking(budget=0.5).cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    assert [one.workspace for one in cache.reports()] == alone == [LAYERS * 2 * n * 4 for n in lengths]
    cache.reorder_cache(torch.tensor([2, 0]))
    assert [one.workspace for one in cache.reports()] == [alone[2], alone[0]]


def test_a_ranking_over_all_layers_is_the_same_in_a_group_alone_and_in_generate(llama):
    ids, _ = padded_prompt([N, N])
    methods = [Ranking(budget=0.5), load_method("snapkv", budget=0.5, window=4), Ranking(budget=0.3)]
    with torch.inference_mode():
        group, logits = Group.begin(llama, methods, [0, 1], lambda s: s.run(ids, ends_prompt=True))
        after = group.run(ids[:, :1])
    for i, method in enumerate(methods):
        cache = method.cache_for(llama)
        with torch.inference_mode():
            prompt = llama(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            alone = llama(ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]
        near(logits[2 * i : 2 * i + 2], prompt, run_off())
        near(after[2 * i : 2 * i + 2], alone, run_off())
        member = group.members[i].cache
        assert member.meter.prompt.per_layer == cache.meter.prompt.per_layer
        assert group.members[i].cache.report().held_prompt == cache.report().held_prompt
    cache = methods[0].cache_for(llama)
    llama.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    report = cache.report()
    assert report.per_layer == [9 * report.held_prompt // 10, report.held_prompt // 10]


def test_what_two_layers_share_is_reordered_and_billed_once(llama):
    ids, mask = padded_prompt([N, N, N])
    rows, cache = torch.tensor([1, 2, 0]), Pairs().cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    pair = cache.layers[0].inner.pair
    before = pair.store.k.clone()
    cache.reorder_cache(rows)
    assert pair.turned == 1 and torch.equal(pair.store.k, before[rows])
    report = cache.report()
    assert sum(report.per_layer) == report.held_prompt and report.per_layer[1] == 0
    assert report.held_prompt == sum(x.nbytes for x in pair.tensors())
    assert len(cache) == 2 and cache.get_seq_length() == N


def test_what_two_layers_share_is_copied_once_in_a_fork(llama):
    ids, mask = padded_prompt([N, N])
    cache = Pairs().cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    fork = cache.fork()
    first, second = (layer.inner for layer in fork.layers)
    assert first.pair is second.pair and first.pair is not cache.layers[0].inner.pair
    assert first.stack[1] is second
    with torch.no_grad():
        llama(ids[:, :1], past_key_values=fork, use_cache=True)
    assert len(first.pair.store) == N + 1 and len(cache.layers[0].inner.pair.store) == N


def test_a_layer_without_storage_reads_one_below_it_and_pays_for_the_read(llama):
    ids, mask = padded_prompt([N + 1])
    cache = Reading().cache_for(llama)
    feed(llama, cache, ids, mask, (N, 1))
    lower, upper = (layer.inner for layer in cache.layers)
    assert upper.below(0) is lower and not list(upper.tensors())
    for layer, index in ((lower, 0), (upper, 1), (upper, -1)):
        with pytest.raises(IndexError, match="is not below"):
            layer.below(index)
    report = cache.report()
    assert report.per_layer == [report.held_prompt, 0]
    assert report.workspace > 0 and not lower.scratch  # the keys that were handed up, while the pass lasted
    assert report.read_step == LAYERS * (N + 1) * 2 * 2 * 8 * 4  # the lower layer's keys and values, by both
