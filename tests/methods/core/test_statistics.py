"""What a method asks of attention comes with its output: of any rows, alone and in groups, in chunks and by row."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import Rules, Sums, attend_with_sums, attention_probs, moments, seen_by, uniform
from methods import load_method
from methods.core.contract import Stage, Step
from methods.core.evicting import blocks
from methods.core.evicting.rows import drawn_rows
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from runners.engine.shared_prefill import Group
from tests.bounds import bound, near, run_off
from tests.methods.conftest import kept
from tests.tiny import feed, padded_prompt, tiny_model

N = 40


@dataclass
class Squares(Eviction):
    """Squared attention of every other query, near slots left out; and what the newest four give."""

    def sums(self, store: Store, step: Step) -> Mapping[Hashable, Sums]:
        odd = (step.pos % 2 == 1).float()
        return {("squares", "odd"): Sums(weights=odd, squared=True, least=3)}

    def n_window_queries(self, store: Store, step: Step) -> int:
        return min(4, step.q.shape[2]) if step.stage is Stage.ENDS_PROMPT else 0

    def observe_sums(self, store: Store, step: Step, sums: Mapping[Hashable, Tensor]) -> None:
        B, H, S = store.pos.shape
        (value,) = sums.values()
        store.add("squares", value.view(B, H, -1, S).sum(2))

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        assert cut.mass is not None
        B, H, S = store.pos.shape
        return store.track("squares") + 0.1 * cut.mass.view(B, H, -1, S).sum(2)


@dataclass
class Drawn(Eviction):
    """Mean, variance and greatest attention of a third of the prompt's queries, drawn before it came."""

    again: bool = False

    def _weights(self, step: Step) -> Tensor:
        assert step.prompt_len is not None
        return drawn_rows(step, self.seed, step.prompt_len // 3, step.prompt_len - 4, self.again)

    def sums(self, store: Store, step: Step) -> Mapping[Hashable, Sums]:
        w = self._weights(step)
        key = self.seed, self.again
        three = Sums(weights=w), Sums(weights=w, squared=True), Sums(weights=w, greatest=True)
        return {(name, *key): one for name, one in zip(("sum", "squares", "most"), three, strict=True)}

    def observe_sums(self, store: Store, step: Step, sums: Mapping[Hashable, Tensor]) -> None:
        B, H, S = store.pos.shape
        total, squares, most = (x.view(B, H, -1, S) for x in sums.values())
        store.add("sum", total.sum(2)), store.add("squares", squares.sum(2))
        store.add("n", seen_by(step.pos, store.pos, step.rules, self._weights(step)))
        old = store.track("most")
        store.add("most", torch.maximum(old, most.amax(2)) - old)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        mean, variance = moments(store.track("sum"), store.track("squares"), store.track("n"))
        return mean + 10 * variance + store.track("most")


@dataclass
class OfBlocks(Eviction):
    """The greatest attention of each block of 7 queries, added up over the blocks."""

    def block_size(self, n: int) -> int:
        return 7

    def observe_block(self, store: Store, step: Step, probs: Tensor, pos: Tensor) -> None:
        assert ((pos < 0).all(1) | (pos[:, 0] % 7 == 0)).all()
        store.add("most", probs.amax(3).sum(2))

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return store.track("most")


def times_drawn(n: int, layer: int, sample: int, again: bool) -> Tensor:
    """How often each of n positions is drawn, from the numbers of positions or of draws."""
    among, count = n - 4, n // 3
    u = uniform(0, torch.tensor(sample), torch.tensor(layer), torch.arange(n))
    if again:
        return torch.bincount((u[:count] * among).long(), minlength=n).double()
    return torch.zeros(n).double().scatter(0, u[:among].argsort()[:count], 1.0)


def drawn_scores(attention: Tensor, layer: int, sample: int, again: bool) -> Tensor:
    """By KV head [2, n], from the model's attention [1, Hq, n, n]."""
    n = attention.shape[-1]
    w = times_drawn(n, layer, sample, again)[:, None]
    p = attention[0].double().unflatten(0, (2, -1))  # [H, G, n, n]
    seen = (w * (torch.arange(n)[:, None] >= torch.arange(n))).sum(0).clamp_min(1)
    mean, squares = (w * p).sum((1, 2)) / seen, (w * p.square()).sum((1, 2)) / seen
    return mean + 10 * (squares - mean.square()).clamp_min(0) + (w * p).amax((1, 2))


def block_scores(attention: Tensor, layer: int, sample: int) -> Tensor:
    p = attention[0].double().unflatten(0, (2, -1))
    return torch.stack([p[:, :, i : i + 7].amax(2) for i in range(0, p.shape[2], 7)]).sum((0, 2))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(N,), (15, 25), (7, 1, 20, 12)])
@pytest.mark.parametrize("kind", ["drawn", "drawn again", "blocks"])
def test_drawn_queries_and_blocks_are_a_rows_own_whatever_the_pieces_and_the_padding(llama, kind, pieces):
    ids, mask = padded_prompt([N, N - 11])
    method = OfBlocks(budget=0.5) if kind == "blocks" else Drawn(budget=0.5, again=kind == "drawn again")
    scores = block_scores if kind == "blocks" else partial(drawn_scores, again=kind == "drawn again")
    cache = method.cache_for(llama, prompt_len=N)
    feed(llama, cache, ids, mask, pieces)
    for row, n in enumerate((N, N - 11)):
        attentions = llama(ids[row : row + 1, N - n :], output_attentions=True).attentions
        for layer, p in enumerate(attentions):
            best = scores(p, layer, row).topk(n // 2, dim=-1).indices
            assert [kept(cache, layer, row, head) for head in range(2)] == [sorted(x.tolist()) for x in best]


def test_queries_short_of_a_block_are_workspace_and_go_with_their_rows(llama):
    ids, mask = padded_prompt([N, N - 11])
    cache = OfBlocks(budget=0.5).cache_for(llama, prompt_len=N)
    with torch.no_grad():
        feed(llama, cache, ids[:, :25], mask[:, :25], (25,))
        inner = cache.layers[0].inner
        q, pos = inner.blocks.held
        assert pos.tolist() == [[21, 22, 23, 24], [-1] * 4]
        assert any(x.data_ptr() == q.data_ptr() for x in inner.workspace())
        inner.reorder(torch.tensor([1, 0]))
        assert inner.blocks.held[1].tolist() == pos[[1, 0]].tolist()


@torch.inference_mode()
def test_blocks_are_computed_once_for_a_group(llama, monkeypatch):
    made, real = [], blocks.attention_probs
    monkeypatch.setattr(blocks, "attention_probs", lambda *a, **k: made.append(1) or real(*a, **k))
    ids, _ = padded_prompt([N])
    methods = [OfBlocks(budget=share) for share in (0.5, 0.25, 0.1)]
    group, _ = Group.begin(llama, methods, [0], lambda s: s.run(ids, ends_prompt=True))
    assert len(made) == 2 * math.ceil(N / 7)  # layers and blocks
    alone = methods[2].cache_for(llama)
    llama(ids, past_key_values=alone)
    assert sets(group.members[2].cache) == sets(alone)


def test_a_query_sees_what_is_not_behind_it_and_not_too_far_before_it():
    q_pos, k_pos = torch.tensor([[-1, 3, 4, 9], [0, 1, 2, 3]]), torch.tensor([[[-1, 0, 4, 9, 5]], [[0, 1, 2, 3, -1]]])
    w = torch.tensor([[5.0, 1, 2, 4]])
    for window in (None, 3):
        back = q_pos[:, None, :, None] - k_pos[:, :, None]
        seen = (back >= 0) & (k_pos >= 0)[:, :, None] & (q_pos >= 0)[:, None, :, None]
        seen &= back < (window or 100)
        rules = Rules(1.0, window=window)
        assert torch.equal(seen_by(q_pos, k_pos, rules), seen.sum(2).float())
        assert torch.equal(seen_by(q_pos, k_pos, rules, w), (seen * w[:, None, :, None]).sum(2))


@pytest.mark.parametrize("T", [1, 9])
def test_the_greatest_attention_stands_beside_sums_in_the_order_they_are_asked_in(T):
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, 20, 16, generator=g) for heads in (4, 2, 2))
    pos = torch.arange(20, dtype=torch.int32).expand(2, -1)
    q, w = q[:, :, -T:], torch.rand(2, T, generator=g)
    asked = [Sums(), Sums(greatest=True), Sums(squared=True), Sums(greatest=True, weights=w, squared=True, least=2)]
    at = {"q_pos": pos[:, -T:], "k_pos": pos[:, None], "layout": "tail"}
    rules = Rules(0.25)
    out, values = attend_with_sums(q, k, v, rules, asked, **at)
    p = attention_probs(q.double(), k.double(), rules, q_pos=at["q_pos"], k_pos=at["k_pos"]).double().flatten(1, 2)
    far = (at["q_pos"][:, :, None] - pos[:, None])[:, None] >= 2
    expected = [p.sum(2), p.amax(2), p.square().sum(2), (p.square() * w[:, None, :, None] * far).amax(2)]
    for ours, theirs in zip(values, expected, strict=True):
        near(ours, theirs, bound(torch.float32, 20, 10.0, size=float(T), width=16))
    assert out is not None and attend_with_sums(q, k, None, rules, asked[1:2], **at)[0] is None


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", attn_implementation="eager")


def expected(model, ids: Tensor, share: float = 0.5) -> list[list[list[int]]]:
    """What the untouched model's attention ranks highest, by layer and head."""
    n, out = ids.shape[1], []
    i = torch.arange(n)
    for p in model(ids, output_attentions=True).attentions:  # [1, Hq, n, n]
        squares = (p[0].double() ** 2 * (i[:, None] % 2 == 1) * (i[:, None] - i >= 3)).sum(1)
        score = (squares + 0.1 * p[0, :, -4:].double().sum(1)).unflatten(0, (2, -1)).sum(1)
        out.append([sorted(row.topk(int(n * share)).indices.tolist()) for row in score])
    return out


def sets(cache, row: int = 0) -> list[list[list[int]]]:
    return [[kept(cache, layer, row, head) for head in range(2)] for layer in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(N,), (15, 25), (7, 1, 20, 12)])
def test_any_rows_and_any_power_of_attention_decide_in_chunks_too(llama, pieces):
    ids, mask = padded_prompt([N])
    cache = Squares(budget=0.5).cache_for(llama, prompt_len=N)
    near(feed(llama, cache, ids, mask, pieces), llama(ids).logits, run_off())
    assert sets(cache) == expected(llama, ids)


@torch.no_grad()
def test_rows_with_padding_are_summed_over_their_own_tokens(llama):
    ids, mask = padded_prompt([N, N - 11])
    cache = Squares(budget=0.5).cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    for row, n in enumerate((N, N - 11)):
        assert sets(cache, row) == expected(llama, ids[row : row + 1, N - n :])


@torch.inference_mode()
def test_members_of_a_group_that_ask_by_one_key_compute_it_once(llama, monkeypatch):
    asked = []
    real = Store.attend_with_sums
    monkeypatch.setattr(Store, "attend_with_sums", lambda *a, **k: asked.append(1) or real(*a, **k))
    ids, _ = padded_prompt([N])
    methods = [Squares(budget=0.5), load_method("snapkv", budget=0.5, window=4), Squares(budget=0.25)]
    group, _ = Group.begin(llama, methods, [0], lambda s: s.run(ids, ends_prompt=True))
    assert len(asked) == 2  # layers
    for i, share in ((0, 0.5), (2, 0.25)):
        assert sets(group.members[i].cache) == expected(llama, ids, share)


@torch.no_grad()
@pytest.mark.parametrize("store", [Store, RaggedStore])
def test_while_decoding_they_come_with_the_tokens_own_attention(llama, store):
    ids, mask = padded_prompt([N + 6])
    cache = Squares(budget=0.5, store=store).cache_for(llama)
    feed(llama, cache, ids, mask, (N, 1, 1, 4))
    inner = cache.layers[0].inner
    held = [kept(cache, 0, 0, head) for head in range(2)]
    assert all(set(range(N, N + 6)) <= set(one) for one in held)
    after = inner.store.track("squares")[0]
    assert torch.isfinite(after).all() and float(after.min()) >= 0
    newest = inner.store.pos[0] >= N + 3  # nothing of them is seen from three tokens on
    assert (after[newest] == 0).all()
