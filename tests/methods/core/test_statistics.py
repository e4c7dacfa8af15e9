"""What a method asks of attention comes with its output: of any rows, alone and in groups, in chunks and by row."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import Sums
from methods import load_method
from methods.core.contract import Stage, Step
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from runners.engine.shared_prefill import Group
from tests.bounds import near, run_off
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
