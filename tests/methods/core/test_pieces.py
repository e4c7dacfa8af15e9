"""A method that reads its prompt in chunks of its own does so wherever it comes from, by each row's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from methods import load_method
from methods.core.binding.pieces import ends_of
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache
from runners.engine.generation import Prompt, generate
from runners.engine.session import Session
from tests.bounds import near, run_off
from tests.methods.conftest import kept
from tests.tiny import feed, padded_prompt, tiny_model

N, CHUNK, STAYS = 40, 8, 5


class Block(EvictionCache):
    """Rows that have read a whole chunk keep their newest slots."""

    method: Blockwise

    def __init__(self, method, prompt_len):
        super().__init__(method, prompt_len)
        self.passes: list[int] = []

    def end_step(self, step: Step) -> None:
        super().end_step(step)
        self.passes.append(step.q.shape[2])
        if step.stage not in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            return
        read = step.pos.amax(-1) + 1  # [B]
        due = (read % CHUNK == 0) & (read > 0)
        pos = self.store.pos
        keep = (pos >= 0) & (~due[:, None, None] | (pos >= (read - STAYS)[:, None, None]))
        self.store.keep(keep, int(keep.sum(-1).max()))


@dataclass
class Blockwise(Eviction):
    """The newest slots after every chunk."""

    changes_prompt = True

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [Block(self, prompt_len) for _ in range(spec.n_layers)]

    def prompt_chunk(self, n: int) -> int | None:
        return CHUNK


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def alone(model, ids, mask=None):
    cache = Blockwise().cache_for(model)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return out, cache


def test_a_prompt_in_one_forward_is_read_in_the_methods_own_chunks(llama):
    ids, _ = padded_prompt([N + 3])
    out, cache = alone(llama, ids)
    assert cache.layers[0].inner.passes == [CHUNK] * 5 + [3]
    assert out.shape[1] == N + 3 and cache.get_seq_length() == N + 3
    assert kept(cache, 1, 0, 0) == [*range(N - STAYS, N + 3)]
    # the same by hand: what has been dropped is not attended to
    stock = load_method("full").cache_for(llama)
    near(out[:, :CHUNK], feed(llama, stock, ids[:, :CHUNK], torch.ones_like(ids[:, :CHUNK]), (CHUNK,)), run_off())
    assert float((out[:, -1] - llama(ids).logits[:, -1]).abs().max()) > run_off()


@pytest.mark.parametrize("pieces", [(10, 33), (1, 7, 8, 1, 26), (8, 8, 8, 8, 8, 3), (43,)])
def test_a_prompt_in_other_pieces_is_cut_anew(llama, pieces):
    ids, mask = padded_prompt([N + 3])
    expected, one = alone(llama, ids)
    cache = Blockwise().cache_for(llama, prompt_len=N + 3)
    near(feed(llama, cache, ids, mask, pieces), expected, run_off())
    assert [kept(cache, layer, 0, 1) for layer in range(2)] == [kept(one, layer, 0, 1) for layer in range(2)]
    assert max(cache.layers[0].inner.passes) <= CHUNK
    # the chunk bounds what is held while the prompt is read, whatever the pieces
    assert max(cache.meter.peak_prompt, one.meter.peak_prompt) < cache.report().full_prompt / 3


def test_rows_of_unequal_length_are_cut_each_by_its_own_tokens(llama):
    lengths = [N + 3, N - 2, 9, 5]
    ids, mask = padded_prompt(lengths)
    out, cache = alone(llama, ids, mask)
    for row, n in enumerate(lengths):
        expected, one = alone(llama, ids[row : row + 1, N + 3 - n :])
        near(out[row, N + 3 - n :], expected[0], run_off())
        assert kept(cache, 1, row, 0) == kept(one, 1, 0, 0)


def test_generate_beams_and_the_runner_read_so_too(llama):
    ids, _ = padded_prompt([N + 3])
    expected = None
    for words in (dict(), dict(num_beams=2)):
        cache = Blockwise().cache_for(llama)
        with torch.inference_mode():
            out = llama.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **words)
        assert out.shape[1] == N + 7 and cache.layers[0].inner.passes[:6] == [CHUNK] * 5 + [3]
        expected = out if expected is None else expected
    for chunk in (None, 10, 64):
        prompt = Prompt(ids[0].tolist(), N + 3, 4)
        answers, _, _ = generate(llama, Blockwise(), [prompt], chunk=chunk)
        assert answers[0].ids == expected[0, N + 3 :].tolist()


def test_later_turns_come_as_they_come(llama):
    ids, mask = padded_prompt([N + 20])
    cache = Blockwise().cache_for(llama)
    feed(llama, cache, ids, mask, (N, 17, 1, 2))
    assert cache.layers[0].inner.passes == [CHUNK] * 5 + [17, 1, 2]


def test_cuts_are_where_a_row_has_a_whole_chunk():
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert ends_of(real, None, 3) == [3, 5, 6, 7]
    assert ends_of(real, torch.tensor([2, 0]), 3) == [1, 4, 5, 7]
    assert ends_of(real[:1, :6], None, 3) == [3, 6]
    assert ends_of(real[:1], None, 100) == [7]


def test_what_a_prompt_in_pieces_cannot_give_is_refused_by_name(llama):
    ids, _ = padded_prompt([N])
    for given in (dict(labels=ids), dict(output_hidden_states=True)):
        with pytest.raises(UserError, match=f"{next(iter(given))}: a prompt is read in chunks of the method's own"):
            llama(ids, past_key_values=Blockwise().cache_for(llama), use_cache=True, **given)
    mask = torch.ones(1, 1, N, N)
    with pytest.raises(UserError, match=r"give a mask \[B, tokens\]"):
        llama(ids, attention_mask=mask, past_key_values=Blockwise().cache_for(llama), use_cache=True)


def test_a_session_counts_the_prompt_once(llama):
    ids, _ = padded_prompt([N])
    cache = Blockwise().cache_for(llama)
    session = Session(llama, cache, 1)
    with torch.inference_mode():
        session.feed([ids[0].tolist()])
        session.feed([[5]])
    assert cache.get_seq_length() == N + 1 and int(session.counts) == N + 1
