"""Frequencies that follow the length: what our caches answer is the untouched model's, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from methods import load_method
from methods.core.binding.lengths import CrossesSwitch
from methods.core.errors import UserError
from runners.engine.generation import Prompt, generate, together
from tests.tiny import VOCAB, tiny_model

SWITCH, NEW = 64, 6
_LONG = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 6.0, 12.0],
    original_max_position_embeddings=SWITCH, factor=2.0, partial_rotary_factor=1.0,
)  # fmt: skip
_DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)

#: prompts whose answers are the untouched model's, and those whose sequence would cross the switch
HOLDS = {"longrope": (30, 59, 65, 100), "dynamic": (30, 60, 64, 65, 100)}
CROSSES = (60, 62, 63, 64)


def model_of(kind: str) -> PreTrainedModel:
    if kind == "dynamic":
        return tiny_model("llama", max_position_embeddings=SWITCH, rope_parameters=_DYNAMIC)
    return tiny_model("phi3", partial_rotary_factor=1.0, original_max_position_embeddings=SWITCH, rope_parameters=_LONG)


@pytest.fixture(params=HOLDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    """The untouched models, which nothing runs but copies of them, and models to bind."""
    made = {kind: model_of(kind) for kind in HOLDS}
    return {kind: (stock, copy.deepcopy(stock)) for kind, stock in made.items()}


def tokens(n: int) -> Tensor:
    return torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def expected(stock: PreTrainedModel, n: int) -> list[int]:
    """What the untouched model, which has met nothing before, generates after a prompt of n tokens."""
    said = stock.__dict__.setdefault("said", {})
    if n not in said:
        said[n] = copy.deepcopy(stock).generate(tokens(n), max_new_tokens=NEW, do_sample=False)[0, n:].tolist()
    return said[n]


def answered(model: PreTrainedModel, n: int, **how: Any) -> list[int]:
    prompt = Prompt(tokens(n)[0].tolist(), n_context=n // 2, max_new_tokens=NEW)
    (answer,), _, _ = generate(model, load_method("full"), [prompt], **how)
    return answer.ids


def test_the_switch_changes_what_the_model_says(models, kind):
    stock, _ = models[kind]
    plain = copy.deepcopy(stock)
    with torch.no_grad():
        far, near = (plain(x, past_key_values=DynamicCache()).logits for x in (tokens(100), tokens(100)[:, :60]))
    assert (far[:, :60] - near).abs().max() > 0.1


def test_answers_on_one_side_of_the_switch_are_the_untouched_models_whole_and_in_chunks(models, kind):
    stock, bound = models[kind]
    for n in HOLDS[kind]:
        for chunk in (None, 7, 40):
            assert answered(bound, n, chunk=chunk) == expected(stock, n), (n, chunk)


def test_generate_with_our_cache_gives_them_too(models, kind):
    stock, bound = models[kind]
    for n in HOLDS[kind]:
        cache = load_method("full").cache_for(bound)
        with torch.no_grad():
            out = bound.generate(tokens(n), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert out[0, n:].tolist() == expected(stock, n), n
        assert cache.get_seq_length() == n + NEW - 1  # the cache was used to the end


def test_a_sequence_that_crosses_the_switch_is_refused_with_the_length_that_holds(models):
    _, bound = models["longrope"]
    for n in CROSSES:
        with pytest.raises(
            CrossesSwitch, match=r"phi3: its RoPE \(longrope\) .* within 64 tokens, or the prompt alone"
        ):
            answered(bound, n)
        cache = load_method("snapkv", budget=0.5).cache_for(bound)
        with pytest.raises(CrossesSwitch, match="within 64 tokens"), torch.no_grad():
            bound.generate(tokens(n), past_key_values=cache, max_new_tokens=NEW, do_sample=False)


def test_a_question_that_crosses_the_switch_is_refused_and_one_that_does_not_is_answered(models, kind):
    stock, bound = models[kind]
    assert answered(bound, 50, protocol="agnostic") == expected(stock, 50)
    with pytest.raises(CrossesSwitch, match="within 64 tokens"):
        answered(bound, 100, protocol="agnostic")
    if kind == "longrope":
        assert answered(bound, 140, protocol="agnostic") == expected(stock, 140)
    else:
        with pytest.raises(CrossesSwitch, match="its question stands in the prompt"):
            answered(bound, 140, protocol="agnostic")


def test_no_answer_depends_on_the_samples_before_it(models, kind):
    stock, bound = models[kind]
    for before in (100, 30):
        answered(bound, before)
        for n in (65, 70):
            assert answered(bound, n) == expected(stock, n)


def test_two_sequences_in_turns_do_not_meet(models, kind):
    stock, bound = models[kind]
    prompts, caches = [tokens(100), tokens(65)], [load_method("full").cache_for(bound) for _ in range(2)]
    said: list[list[int]] = [[], []]
    with torch.no_grad():
        now = list(prompts)
        for _ in range(NEW):
            for i in range(2):
                at = torch.arange(now[i].shape[1])[None] + caches[i].get_seq_length()
                logits = bound(now[i], position_ids=at, past_key_values=caches[i]).logits
                now[i] = logits[:, -1:].argmax(-1)
                said[i].append(int(now[i]))
    assert said == [expected(stock, 100), expected(stock, 65)]


def test_plain_calls_are_the_untouched_models_whatever_our_caches_met(models, kind):
    stock, bound = models[kind]
    plain = copy.deepcopy(stock)
    with torch.no_grad():
        for n in (100, 80, 30, 70):
            answered(bound, 120)
            assert torch.equal(bound(tokens(n)).logits, plain(tokens(n)).logits)


def test_rows_that_the_model_would_turn_otherwise_by_themselves_are_refused_together(models, kind):
    stock, bound = models[kind]

    def rows(*lengths):
        return [Prompt(tokens(n)[0].tolist(), n, NEW) for n in lengths]

    with pytest.raises(CrossesSwitch, match=r"rows of 30 and 100 tokens .* batch_size=1"):
        generate(bound, load_method("full"), rows(30, 100))
    if kind == "longrope":  # one that grows out of its side is not helped by being alone
        with pytest.raises(CrossesSwitch, match="within 64 tokens"):
            generate(bound, load_method("full"), rows(30, 62))
    answers, _, _ = generate(bound, load_method("full"), rows(30, 50), chunk=16)
    assert [answer.ids for answer in answers] == [expected(stock, 30), expected(stock, 50)]
    answers, _, _ = generate(bound, load_method("full"), rows(100, 100), chunk=16)
    assert [answer.ids for answer in answers] == [expected(stock, 100)] * 2


def test_methods_that_share_a_prompt_are_answered_as_alone(models, kind):
    stock, bound = models[kind]
    methods = [load_method("full"), load_method("snapkv", budget=0.5, window=4)]
    prompts = [Prompt(tokens(65)[0].tolist(), 65, NEW)]
    shared, evicting = together(bound, methods, prompts, chunk=16)
    assert shared.answers[0].ids == expected(stock, 65)
    alone, _, _ = generate(bound, methods[1], prompts)
    assert evicting.answers[0].ids == alone[0].ids
    if kind == "longrope":
        with pytest.raises(CrossesSwitch):
            together(bound, methods, [Prompt(tokens(62)[0].tolist(), 62, NEW)])


def test_keys_are_not_rolled_where_frequencies_change(models, kind):
    with pytest.raises(UserError, match="fixed frequencies"):
        load_method("streaming_llm", budget=12).cache_for(models[kind][1])
