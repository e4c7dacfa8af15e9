"""Token ids, kinds of tokens and named parts of a prompt, for methods that look at them, by row and in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from methods import load_method
from methods.core.contract import SPANS, LayerCache, Method, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import EvictionCache
from runners.engine.shared_prefill import Group
from tests.tiny import feed, padded_prompt, tiny_model

N = 24
WORDS = ["<s>", "<pad>", ".", "?!", " ,", "a", "b.", "\n", "\n\n", "…", "$", " "]


class Told(EvictionCache):
    """What a layer was told of every pass."""

    def __init__(self, method: Method, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.ids: list[Tensor] = []
        self.parts: list[Tensor] = []

    def append(self, step: Step) -> None:
        super().append(step)
        self.ids.append(step.ids)
        self.parts.append(step.span("context"))
        self.prompts = [*getattr(self, "prompts", []), step.prompt_len.tolist()]


@dataclass
class Odd(load_method("window").__class__):
    """Keeps tokens with odd ids and what stands in the context, the newest first where there are too many."""

    needs = frozenset({"ids", "spans", "vocabulary"})

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        assert spec.vocabulary is not None
        return [Told(self, prompt_len) for _ in range(spec.n_layers)]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>")


def spans(rows: int) -> list[dict[str, tuple[int, int]]]:
    return [{"context": (2 + row, 10 + row), "question": (10 + row, N)} for row in range(rows)]


def test_kinds_of_tokens_are_the_tokenizers_own(llama, tokenizer):
    method = Odd(budget=0.5)
    vocabulary = method.cache_for(llama, tokenizer=tokenizer, spans=spans(1)).spec.vocabulary
    said = {
        name: [WORDS[i] for i in getattr(vocabulary, name).nonzero().flatten()]
        for name in ("special", "punctuation", "newline")
    }
    assert said == {"special": ["<s>", "<pad>"], "punctuation": [".", "?!", " ,", "…"], "newline": ["\n", "\n\n"]}
    assert len(vocabulary.special) == 97  # the model's, which has more tokens than its tokenizer
    assert vocabulary.encode("a ?!") == [5, 3]
    # made once, and known to later caches of the model
    assert method.cache_for(llama, spans=spans(1)).spec.vocabulary is vocabulary


@pytest.mark.parametrize("pieces", [(N,), (10, 14)])
def test_ids_and_parts_reach_the_step_of_every_row_in_order(llama, tokenizer, pieces):
    ids, mask = padded_prompt([N, N - 5] if len(pieces) == 1 else [N, N])
    cache = Odd(budget=0.5).cache_for(llama, prompt_len=N, tokenizer=tokenizer, spans=spans(2))
    feed(llama, cache, ids, mask, pieces)
    told = cache.layers[1].inner
    assert torch.equal(torch.cat(told.ids, dim=1), ids)
    assert told.parts[0].tolist() == [[2, 10], [3, 11]]
    with torch.no_grad():
        llama(ids[:, :1], past_key_values=cache, use_cache=True)
    assert torch.equal(told.ids[-1], ids[:, :1])


@pytest.mark.parametrize("pieces", [(N,), (10, 14), (3, 20, 1)])
def test_the_length_of_a_rows_prompt_is_known_in_every_chunk_of_it(llama, tokenizer, pieces):
    ids, mask = padded_prompt([N, N - 5])
    cache = Odd(budget=0.5).cache_for(llama, prompt_len=N, tokenizer=tokenizer, spans=spans(2))
    feed(llama, cache, ids, mask, pieces)
    told = cache.layers[1].inner.prompts
    first = [N, -1] if pieces[0] == 3 else [N, N - 5]  # of the short row nothing but padding has come
    assert told == [first, *[[N, N - 5]] * (len(pieces) - 1)]
    cache.reorder_cache(torch.tensor([1, 1]))
    with torch.no_grad():
        llama(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.compress_next()
        llama(ids[:, :4], past_key_values=cache, use_cache=True)
    assert told[len(pieces) :] == [] and cache.layers[1].inner.prompts[-2:] == [[N - 5] * 2, [N] * 2]


def test_columns_that_change_places_take_their_ids_along(llama, tokenizer):
    ids, mask = padded_prompt([N, N])
    mask[1, 7:9] = 0  # padding behind tokens
    cache = Odd(budget=0.5).cache_for(llama, tokenizer=tokenizer, spans=spans(2))
    feed(llama, cache, ids, mask, (N,))
    told = cache.layers[0].inner.ids[0]
    assert torch.equal(told[0], ids[0])
    assert told[1].tolist() == [*ids[1, 7:9].tolist(), *ids[1, :7].tolist(), *ids[1, 9:].tolist()]


def test_rows_that_change_places_and_copies_keep_their_own_parts(llama, tokenizer):
    ids, mask = padded_prompt([N, N, N])
    cache = Odd(budget=0.5).cache_for(llama, tokenizer=tokenizer, spans=spans(3))
    feed(llama, cache, ids, mask, (N,))
    fork = cache.fork()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    with torch.no_grad():
        for one in (cache, fork):
            llama(ids[:, :1], past_key_values=one, use_cache=True)
    assert cache.layers[0].inner.parts[-1].tolist() == [[4, 12], [2, 10], [2, 10]]
    assert fork.layers[0].inner.parts[-1].tolist() == [[2, 10], [3, 11], [4, 12]]


def test_members_of_a_group_are_told_of_their_own_rows(llama, tokenizer):
    ids, _ = padded_prompt([N, N])
    Odd(budget=0.5).cache_for(llama, tokenizer=tokenizer, spans=spans(2))  # the tokenizer is known from here on
    methods = [Odd(budget=0.5), load_method("snapkv", budget=0.5, window=4), Odd(budget=0.25)]
    with torch.inference_mode():
        group, _ = Group.begin(llama, methods, [0, 1], lambda s: s.run(ids, ends_prompt=True), spans=spans(2))
        group.run(ids[:, :1])
    for i in (0, 2):
        told = group.members[i].cache.layers[1].inner
        assert torch.equal(told.ids[0], ids) and torch.equal(told.ids[1], ids[:, :1])
        assert [part.tolist() for part in told.parts] == [[[2, 10], [3, 11]]] * 2


def test_parts_have_names_and_bounds(llama, tokenizer):
    assert SPANS == ("template", "context", "question", "instruction")
    method = Odd(budget=0.5)
    for wrong, says in (
        ([{"story": (0, 3)}], "names 'story'; there are template, context"),
        ([{"context": (5, 3)}], r"\(5, 3\)"),
    ):
        with pytest.raises(UserError, match=says):
            method.cache_for(llama, tokenizer=tokenizer, spans=wrong)
    cache = method.cache_for(llama, tokenizer=tokenizer, spans=spans(1))
    with pytest.raises(UserError, match="spans: of 1 rows for a batch of 2"):
        feed(llama, cache, *padded_prompt([N, N]), (N,))


def test_what_is_not_given_is_refused_by_name_before_anything_runs(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"which tokens are special.*tokenizer=tokenizer"):
        Odd(budget=0.5).cache_for(model, spans=spans(1))
    with pytest.raises(UserError, match=r"which part of a prompt is template or context.*spans="):
        Odd(budget=0.5).cache_for(model, tokenizer=tokenizer)
    cache = Odd(budget=0.5).cache_for(model, tokenizer=tokenizer, spans=spans(1))
    with pytest.raises(UserError, match="needs token ids; give the model input_ids"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, N, 32), past_key_values=cache, use_cache=True)
    step = Step(
        0, 1, Stage.DECODE, *[torch.zeros(1, 1, 1, 1)] * 3, *[torch.zeros(1, 1)] * 2, False, torch.zeros(1), None
    )
    with pytest.raises(UserError, match='needs` names "spans"'):
        step.span("context")
    # and the model answers as it did
    ids, mask = padded_prompt([N])
    feed(model, load_method("full").cache_for(model), ids, mask, (N,))
