"""A mistake in a method's file is said with its place, and its traceback is in the record."""

from pathlib import Path

import pytest
import torch

from methods.snapkv import SnapKV
from methods.tova import TOVA
from runners.engine.answer import answer, answer_together
from runners.engine.problem import problem
from tests.runners.engine.test_answer import TEXT, Example, Method, model, setting  # noqa: F401

HERE = Path(__file__).relative_to(Path(__file__).parents[3])


class Misspelt(SnapKV):
    def score(self, store, step, cut):
        return scroes  # noqa: F821


class Nothing(SnapKV):
    def score(self, store, step, cut):
        return torch.full_like(super().score(store, step, cut), -torch.inf)


class NotANumber(SnapKV):
    def score(self, store, step, cut):
        return super().score(store, step, cut) / 0 * 0


class NaNWhileDecoding(TOVA):
    def score(self, store, step, cut):
        scores = super().score(store, step, cut)
        return scores if step.q.shape[2] > 1 else scores * torch.nan


EXPECTED = {
    Misspelt: f"NameError: name 'scroes' is not defined ({HERE}, line ",
    Nothing: "FloatingPointError: score gave -inf for all slots of a row",
    NotANumber: "FloatingPointError: score gave NaN for",
    NaNWhileDecoding: "FloatingPointError: score gave NaN for",
}


@pytest.mark.parametrize("group", [False, True], ids=["alone", "in a group"])
@pytest.mark.parametrize("mistaken", EXPECTED)
def test_a_mistake_names_its_file_and_line_and_leaves_its_traceback(setting, mistaken, group):  # noqa: F811
    example = Example("a/0", TEXT, "\n\nwho sat?", ["x"], 6, {"subset": "a", "category": "x"})
    method, rows = mistaken(budget=0.25), []
    if group:
        (error,) = answer_together(setting, [method], [example])
        found = problem(error)
        line, trace = found.line, found.traceback
    else:
        answer(setting, method, [example], rows.append)
        line, trace = rows[0]["error"], rows[0]["traceback"]
    assert line.replace(f"{Path(__file__).parents[3]}/", "").startswith(EXPECTED[mistaken])
    assert f"{HERE}, line {mistaken.score.__code__.co_firstlineno + (mistaken is Misspelt)}" in line
    assert trace.startswith("Traceback (most recent call last)") and line.split(" (")[0].split(": ")[0] in trace


def test_what_is_kept_of_an_exception_outlives_its_traceback():
    try:
        raise RuntimeError("lost\nmore")
    except RuntimeError as caught:
        first, error = problem(caught), caught
    bare = error.with_traceback(None)
    assert problem(bare) == first and first.line.startswith("RuntimeError: lost (") and "more" in first.traceback


def test_a_slot_may_score_minus_infinity_as_long_as_another_does_not(setting):  # noqa: F811
    class Some(SnapKV):
        def score(self, store, step, cut):
            scores = super().score(store, step, cut)
            return scores.masked_fill(cut.age_rank == 0, -torch.inf)

    rows: list[dict] = []
    answer(setting, Some(budget=0.25), [Example("a/0", TEXT, "", ["x"], 2)], rows.append)
    assert "error" not in rows[0]
