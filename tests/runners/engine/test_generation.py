"""Our greedy loop against the library's own generate(), and the ways a row can end."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from methods import load_method
from methods.core.bind import unbound
from methods.full import Full
from runners.engine.generation import Prompt, generate
from runners.engine.session import LOOK_EVERY

NEW = 12


class Stock:
    """Stands in for a method: the library's own cache. Remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def cache_for(self, model, prompt_len=None, samples=None):
        self.asked.append((prompt_len, samples))
        return DynamicCache()


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def prompt_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(*lengths: int, **knobs) -> list[Prompt]:
    knobs = {"max_new_tokens": NEW} | knobs
    return [Prompt(prompt_ids(n, seed=n), n_context=n - 5, sample=n, **knobs) for n in lengths]


def stock_answer(model, prompt: Prompt, **knobs) -> list[int]:
    """New tokens of the library's generate(), alone in its batch."""
    with unbound(model):
        ids = torch.tensor([list(prompt.ids)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            **{"max_new_tokens": prompt.max_new_tokens, "eos_token_id": list(prompt.ends) or -1, **knobs},
        )  # fmt: skip
    return out[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
@pytest.mark.parametrize("lengths", [(40,), (40, 13, 27)])
def test_the_full_cache_answers_as_the_library_does(model, protocol, chunk, lengths):
    rows = prompts(*lengths)
    answers, cache, _ = generate(model, load_method("full"), rows, protocol=protocol, chunk=chunk)
    assert [answer.ids for answer in answers] == [stock_answer(model, row) for row in rows]
    assert {answer.stop for answer in answers} == {"length"}
    cache.check_budget()


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_the_stock_cache_gives_the_same_batches(model, protocol):
    with unbound(model):
        rows = prompts(40, 13, 27)
        together, _, _ = generate(model, Stock(), rows, protocol=protocol)
        alone = [generate(model, Stock(), [row], protocol=protocol)[0][0] for row in rows]
    assert together == alone


def test_a_row_ends_at_its_own_end_token_and_keeps_it(model):
    rows = prompts(40, 13)
    free = [stock_answer(model, row) for row in rows]
    end = free[0][3]
    ended = [Prompt(row.ids, row.n_context, NEW, ends=(end, 99999)) for row in rows]
    answers, _, timings = generate(model, load_method("full"), ended)
    assert answers[0].ids == free[0][: free[0].index(end) + 1] and answers[0].stop == "end"
    assert answers[1].ids == stock_answer(model, ended[1])
    assert timings.steps == max(len(answer.ids) for answer in answers) - 1


def test_the_loop_stops_when_all_rows_have_ended(model):
    (row,) = prompts(40)
    first = stock_answer(model, row)[0]
    answers, _, timings = generate(model, load_method("full"), [Prompt(row.ids, 30, NEW, ends=(first,))])
    assert answers[0].ids == [first] and timings.steps == 0


def test_looking_seldom_runs_a_few_steps_more_and_changes_no_answer(model, monkeypatch):
    rows = prompts(40, 13)
    ends = (stock_answer(model, rows[0])[3], stock_answer(model, rows[1])[4])
    ended = [Prompt(row.ids, row.n_context, 40, ends=ends) for row in rows]
    each, _, often = generate(model, load_method("full"), ended)
    monkeypatch.setitem(LOOK_EVERY, "cpu", 8)
    eighth, _, seldom = generate(model, load_method("full"), ended)
    assert eighth == each and often.steps <= 4 and seldom.steps == 8


def test_ends_do_not_count_before_min_new_tokens(model):
    (row,) = prompts(40)
    first = stock_answer(model, row)[0]
    held = Prompt(row.ids, 30, NEW, min_new_tokens=1, ends=(first,))
    answers, _, _ = generate(model, load_method("full"), [held, *prompts(13)])
    assert answers[0].ids[0] != first
    assert answers[0].ids == stock_answer(model, held, min_new_tokens=1)
    assert answers[1].ids == stock_answer(model, prompts(13)[0])


def test_rows_have_their_own_limits(model):
    rows = [*prompts(40, max_new_tokens=3), *prompts(13, max_new_tokens=9)]
    answers, _, timings = generate(model, load_method("full"), rows)
    assert [len(answer.ids) for answer in answers] == [3, 9] and timings.steps == 8


def test_one_new_token_needs_no_decoding_step(model):
    answers, _, timings = generate(model, load_method("full"), prompts(20, max_new_tokens=1))
    assert len(answers[0].ids) == 1 and timings.steps == 0


def test_nan_logits_are_an_error_of_that_row_alone(model, monkeypatch):
    real, calls = type(model).forward, []

    def broken(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            out.logits[0] = torch.nan
        return out

    monkeypatch.setattr(type(model), "forward", broken)
    answers, _, _ = generate(model, load_method("full"), prompts(40, 13))
    assert answers[0].error and "NaN" in answers[0].error
    assert answers[1].error is None and len(answers[1].ids) == NEW


def test_a_nan_after_a_row_has_ended_is_none_of_its_business(model, monkeypatch):
    real, calls = type(model).forward, []

    def broken(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) > 2:
            out.logits[0] = torch.nan
        return out

    rows = [*prompts(40, max_new_tokens=2), *prompts(13)]
    monkeypatch.setattr(type(model), "forward", broken)
    answers, _, _ = generate(model, load_method("full"), rows)
    assert [answer.error for answer in answers] == [None, None]


def test_a_method_learns_the_prompts_length_only_when_it_comes_in_chunks(model):
    method = Stock()
    with unbound(model):
        for knobs in ({}, {"chunk": 100}, {"chunk": 10}, {"chunk": 10, "protocol": "agnostic"}):
            generate(model, method, prompts(40, 13), **knobs)
    assert method.asked == [(None, [40, 13]), (None, [40, 13]), (40, [40, 13]), (35, [40, 13])]


def test_the_agnostic_protocol_always_leaves_a_token_for_the_question(model):
    ids = prompt_ids(20, seed=1)
    for n_context in (20, 50, 19):
        answers, _, timings = generate(model, load_method("full"), [Prompt(ids, n_context, NEW)], protocol="agnostic")
        assert timings.n_prompt == 19
        assert answers[0].ids == stock_answer(model, Prompt(ids, 20, NEW))
    _, _, timings = generate(model, load_method("full"), [Prompt(ids, 0, NEW)], protocol="agnostic")
    assert timings.n_prompt == 1


def test_timings_count_real_tokens_and_leave_nothing_out(model):
    _, _, aware = generate(model, load_method("full"), prompts(40, 13))
    _, _, agnostic = generate(model, load_method("full"), prompts(40, 13), protocol="agnostic")
    assert aware.n_prompt == 53 and agnostic.n_prompt == 43
    assert aware.prompt > 0 and aware.decode > 0 and agnostic.question > aware.question
    assert aware.total == aware.prompt + aware.question + aware.decode


def test_a_method_may_run_the_model_again_when_the_prompt_is_in(model):
    seen = []

    class Again(Full):
        def after_prompt(self, given, cache):
            seen.append((given is model, len(cache.layers[0].inner.store)))

    generate(model, Again(), [Prompt([3, 4, 5, 6, 7], n_context=3, max_new_tokens=2)], chunk=2)
    assert seen == [(True, 5)]
