"""A method runs the model again over tokens that its cache sees and does not store, wherever a prompt can end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import attention_probs
from methods import load_method
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.eviction import Eviction, EvictionCache
from methods.core.probe import attend_beside
from runners.engine.beam_search import search_beams
from runners.engine.generation import Prompt
from runners.engine.shared_prefill import Group
from tests.bounds import near, run_off
from tests.methods.conftest import kept
from tests.tiny import feed, padded_prompt, tiny_model

N = 40
AGAIN = torch.tensor([[7, 3, 11, 5, 60, 2]])  # what the model is asked to read on top of the prompt


class Reread(EvictionCache):
    """One layer, scored by the attention of tokens that it does not store."""

    method: Rereading

    def probe(self, step: Step) -> Tensor:
        k = torch.cat((self.store.read()[0], step.k), dim=2)
        k_pos = torch.cat((self.store.pos, step.pos[:, None].expand(-1, step.k.shape[1], -1)), dim=2)
        p = attention_probs(step.q, k, step.rules, q_pos=step.pos, k_pos=k_pos)  # [B, H, G, T, S]
        self.scratch["score"] = p.amax(dim=(2, 3))[..., : len(self.store)]
        return attend_beside(self.store, step)

    def _decide(self, step: Step) -> None:
        """Not yet: the model has not read again."""


@dataclass
class Rereading(Eviction):
    """Keeps what any of the tokens that are read again attends to most."""

    scores: dict = None
    passes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scores = {}

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [Reread(self, prompt_len) for _ in range(spec.n_layers)]

    def end_pass(self, caches: Sequence[LayerCache], step: Step) -> None:
        if step.stage is Stage.PROBE:
            self.passes += 1
            self.scores = {i: cache.scratch["score"] for i, cache in enumerate(caches)}

    def after_prompt(self, model, cache) -> None:
        def read() -> dict:
            cache.probe(model, AGAIN.expand(len(cache._counts), -1))
            return self.scores

        for i, score in cache.once("rereading", read).items():
            store = cache.layers[i].inner.store
            real = store.pos >= 0
            n = (real.sum(-1) * self.budget).long()
            rank = score.masked_fill(~real, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            store.keep(real & (rank < n[..., None]), int(n.max()))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", attn_implementation="eager")


def expected(model, ids: Tensor, share: float) -> list[list[list[int]]]:
    """By layer and head, what the untouched model's attention of the extra tokens ranks highest in a row's prompt."""
    with torch.no_grad():
        layers = model(torch.cat((ids, AGAIN), dim=1), output_attentions=True).attentions
    n, out = ids.shape[1], []
    for p in layers:  # [1, Hq, T, T]
        score = p[0, :, n:, :n].unflatten(0, (2, -1)).amax(dim=(1, 2))  # [H, n]
        out.append([sorted(row.topk(int(n * share)).indices.tolist()) for row in score])
    return out


def sets(cache, row: int = 0) -> list[list[list[int]]]:
    return [[kept(cache, layer, row, head) for head in range(2)] for layer in range(2)]


@pytest.mark.parametrize("pieces", [(N,), (15, 25)])
def test_what_is_read_again_decides_and_is_not_stored(llama, pieces):
    ids, mask = padded_prompt([N])
    method = Rereading(budget=0.5)
    cache = method.cache_for(llama, prompt_len=N if len(pieces) > 1 else None)
    logits = feed(llama, cache, ids, mask, pieces)
    assert sets(cache) == expected(llama, ids, 0.5) and method.passes == 1
    report = cache.report()
    assert report.held_prompt == sum(x.nbytes for layer in cache.layers for x in layer.inner.tensors())
    assert report.share < 0.6 and report.mean_decode == 0 and report.peak_prompt >= report.full_prompt
    assert cache.get_seq_length() == N and cache.compress_seconds > 0
    # the prompt's own output is the untouched model's, and what follows stands at its own position
    near(logits, llama(ids).logits, run_off())
    fork = cache.fork()
    with torch.no_grad():
        llama(ids[:, :1], past_key_values=fork, use_cache=True)
    assert int(fork.layers[0].inner.store.pos.max()) == N


def test_rows_of_unequal_length_read_again_each_behind_its_own_tokens(llama):
    ids, mask = padded_prompt([N, N - 9])
    cache = Rereading(budget=0.5).cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    for row, n in enumerate((N, N - 9)):
        assert sets(cache, row) == expected(llama, ids[row : row + 1, N - n :], 0.5)


def test_generate_and_beams_read_again_too(llama):
    ids, _ = padded_prompt([N])
    method = Rereading(budget=0.5)
    cache = method.cache_for(llama)
    with torch.inference_mode():
        out = llama.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == N + 4 and method.passes == 1
    assert [layer.inner.store.n for layer in cache.layers] == [N // 2 + 3] * 2
    beams = Rereading(budget=0.5)
    _, cache, _ = search_beams(llama, beams, Prompt(ids[0].tolist(), N, 3), 2)
    assert beams.passes == 1 and [layer.inner.store.n for layer in cache.layers] == [N // 2 + 2] * 2


def test_members_of_a_group_that_ask_for_the_same_pay_for_one_pass(llama):
    ids, _ = padded_prompt([N, N])
    methods = [Rereading(budget=0.5), load_method("snapkv", budget=0.5, window=4), Rereading(budget=0.25)]
    with torch.inference_mode():
        group, _ = Group.begin(llama, methods, [0, 1], lambda s: s.run(ids, ends_prompt=True))
    assert [method.passes for method in (methods[0], methods[2])] == [1, 0]
    for i, share in ((0, 0.5), (2, 0.25)):
        member = group.members[i]
        assert member.error is None
        for row in range(2):
            assert sets(member.cache, row) == expected(llama, ids[row : row + 1], share)
        assert share < member.cache.report().share < share + 0.1  # positions come on top


def test_a_second_prompt_reads_again(llama):
    ids, mask = padded_prompt([2 * N])
    method = Rereading(budget=0.5)
    cache = method.cache_for(llama)
    feed(llama, cache, ids[:, :N], mask[:, :N], (N,))
    cache.compress_next()
    feed(llama, cache, ids, mask, (N,), start=N)
    assert method.passes == 2 and len(cache.layers[0].inner.store) == (N // 2 + N) // 2


def test_a_pass_that_fails_decides_nothing_and_leaves_the_cache_where_it_stood(llama):
    class Failing(Rereading):
        def end_pass(self, caches, step):
            if step.stage is Stage.PROBE:
                raise RuntimeError("no")

    ids, mask = padded_prompt([N])
    cache = Failing(budget=0.5).cache_for(llama)
    with pytest.raises(RuntimeError, match="no"):
        feed(llama, cache, ids, mask, (N,))
    assert cache.get_seq_length() == N and len(cache.layers[0].inner.store) == N
    feed(llama, load_method("full").cache_for(llama), ids, mask, (N,))  # and the model answers as it did


def test_a_cache_that_cannot_be_looked_at_says_so(llama):
    ids, mask = padded_prompt([N])
    cache = load_method("kivi").cache_for(llama)
    feed(llama, cache, ids, mask, (N,))
    with pytest.raises(NotImplementedError, match="cannot be looked at"):
        cache.probe(llama, AGAIN)


@pytest.mark.parametrize("rows", [[N], [N, N - 9]])
def test_tokens_of_a_cache_that_has_dropped_nothing_can_be_taken_back(llama, rows):
    ids, mask = padded_prompt([n + 8 for n in rows])
    cache, other = (load_method("full").cache_for(llama) for _ in range(2))
    feed(llama, cache, ids[:, :N], mask[:, :N], (N,))
    wrong = torch.randint(1, 97, (len(rows), 5))
    feed(
        llama,
        cache,
        torch.cat((ids[:, :N], wrong), dim=1),
        torch.cat((mask[:, :N], torch.ones_like(wrong)), dim=1),
        (5,),
        N,
    )
    cache.crop(-5)
    assert cache.get_seq_length() == N and len(cache.layers[0].inner.store) == N
    later = feed(llama, cache, ids, mask, (3, 1, 4), start=N)
    expected = feed(llama, other, ids, mask, (N, 3, 1, 4))[:, N:]
    near(later, expected, run_off())
    assert cache.report().held_end == other.report().held_end and cache.report().full == other.report().full
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop\(5\): give minus"):
        cache.crop(5)


def test_tokens_cannot_be_taken_back_from_what_has_dropped_packed_or_let_go(llama):
    ids, mask = padded_prompt([N])
    sliding = tiny_model("mistral")
    for model, method in ((llama, "snapkv"), (llama, "h2o"), (llama, "kivi"), (sliding, "full")):
        cache = load_method(method).cache_for(model)
        feed(model, cache, ids, mask, (N,))
        with pytest.raises(NotImplementedError, match="cannot be taken back from a compressed cache"):
            cache.crop(-3)
