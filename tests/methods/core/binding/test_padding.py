"""Padding behind tokens, and prompts that are not as long as they were said to be."""

import pytest
import torch

from methods import load_method
from methods.core.binding.padding import padding_first
from methods.core.errors import UserError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_an_order_is_given_only_where_padding_follows_tokens():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert padding_first(left) is None
    assert padding_first(torch.tensor([[1, 0, 1, 0]]).bool()).tolist() == [[1, 3, 0, 2]]


def feed(model, cache, pieces, mask):
    at = 0
    with torch.no_grad():
        for n in pieces:
            ids = torch.ones(mask.shape[0], n, dtype=torch.long)
            at += n
            model(ids, attention_mask=mask[:, :at], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("row", [[1] * 8 + [0] * 4, [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1] + [1] * 9])
def test_padding_behind_the_tokens_of_a_prompt_in_pieces_is_refused_by_name(row, model):
    cache = load_method("h2o").cache_for(model, prompt_len=12)
    with pytest.raises(UserError, match=r"attention_mask: .*prompt_len=12.*on the left"):
        feed(model, cache, [6, 6], torch.tensor([row, [1] * 12]))


@pytest.mark.parametrize("pieces", [[5, 7], [1, 2, 9]])
def test_padding_before_them_is_not(pieces, model):
    cache = load_method("h2o", budget=0.5).cache_for(model, prompt_len=12)
    feed(model, cache, pieces, torch.tensor([[0] * 7 + [1] * 5, [1] * 12]))
    assert 0 < cache.report().share < 1


@pytest.fixture
def waiting(model):
    """A cache that was promised a prompt of 100 tokens and has met 60."""
    cache = load_method("snapkv", budget=0.5).cache_for(model, prompt_len=100)
    feed(model, cache, [60], torch.ones(1, 60, dtype=torch.long))
    return cache


ONLY_60 = "prompt_len=100: only 60 tokens have come"


@pytest.mark.parametrize("ask", ["report", "reports", "check_budget", "compress_next", "expect"])
def test_a_prompt_shorter_than_it_was_said_to_be_has_no_report_and_no_answer(ask, model, waiting):
    with pytest.raises(UserError, match=ONLY_60):
        getattr(waiting, ask)(*([5] if ask == "expect" else []))
    feed(model, waiting, [40], torch.ones(1, 40, dtype=torch.long))
    assert waiting.report().share > 0


def test_tokens_that_come_one_by_one_behind_a_prompt_that_has_not_ended_are_refused_by_name(model, waiting):
    with pytest.raises(UserError, match=ONLY_60):
        feed(model, waiting, [1, 1], torch.ones(1, 2, dtype=torch.long))
    for pieces in ([60, 1, 39], [30, 1, 30, 1, 38], [1] * 100):  # a token alone may be a piece, as may all be
        cache = load_method("snapkv", budget=0.5).cache_for(model, prompt_len=100)
        feed(model, cache, pieces, torch.ones(1, 100, dtype=torch.long))
        assert cache.report().share > 0


def test_generate_refuses_a_prompt_shorter_than_it_was_said_to_be(model):
    cache = load_method("snapkv", budget=0.5).cache_for(model, prompt_len=100)
    ids = torch.ones(1, 60, dtype=torch.long)
    with pytest.raises(UserError, match=ONLY_60):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
