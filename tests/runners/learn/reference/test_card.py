"""What the reference model's card says is what was measured."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runners.learn.reference import card as measured
from tests.bounds import SHARP, bound, near


def test_the_five_gram_model_by_hand():
    # (): 0 and 1 twice each, so p(0) = (2 + 2/2) / 6; after 0 came 1 twice, so p(1 | 0) = (2 + 1/2) / 3
    expected = math.sqrt(1 / (1 / 2 * 5 / 6))
    found = measured.five_gram_perplexity([0, 1, 0, 1], [0, 1], vocabulary=2, order=2)
    near(found, expected, bound(torch.float64, 2, size=2 * expected))


def test_the_longer_memory_predicts_better():
    song = [1, 2, 1, 3] * 20
    short, long = (measured.five_gram_perplexity(song, song, vocabulary=4, order=n) for n in (1, 3))
    assert long < short


def test_what_is_copied_is_looked_for_where_it_was_said_last():
    assert measured._said_at([7, 8, 1, 7, 8, 2, 9], [7, 8]) == 3


def test_the_reference_model_copies_what_it_looks_at():
    tokenizer = AutoTokenizer.from_pretrained(measured.ASSETS)
    layers = measured.measure_attention(tokenizer, measured.ASSETS, length=320)
    assert max(max(layer["copied token"]) for layer in layers) > 0.5
    most = 1 + bound(torch.float32, 320, SHARP, width=32)
    assert all(0.99 < share <= most for share in layers[0]["last 16 tokens"])
    assert all(0 <= share <= most for layer in layers for heads in layer.values() for share in heads)


def test_a_share_of_attention_is_a_share(tmp_path: Path):
    """A model whose queries see everything alike: the first token gets the mean of 1/(q+1), the last 16 of 16/(q+1)."""
    tokenizer = AutoTokenizer.from_pretrained(measured.ASSETS)
    model = AutoModelForCausalLM.from_pretrained(measured.ASSETS, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    even = measured.measure_attention(tokenizer, tmp_path, length=320)[2]
    for name, most in (("first token", 1 / 65), ("last 16 tokens", 16 / 65), ("top 5 % of slots", 0.056)):
        assert 0.1 * most < even[name][0] < most
    near(even["first token"][0], even["last 16 tokens"][3] / 16, 2 * bound(torch.float32, 320, 1.0))
    assert 0.044 < even["top 5 % of slots"][1] < 0.056  # whole slots of few
