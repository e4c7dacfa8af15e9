from dataclasses import replace
from typing import Any

import pytest

from tasks.base import Example, Row, Task, as_parts


class Parrot(Task):
    """Scores an answer that repeats the question."""

    name = "parrot"

    def source(self) -> str:
        return "nowhere"

    def examples(self) -> list[Example]:
        return []

    def score(self, example: Example, prediction: str) -> float:
        return float(prediction == example.question)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {}


def sample(subset: str, category: str) -> Example:
    return Example(f"{subset}/0", "once ", "more", ["x"], 8, {"subset": subset, "category": category})


def test_prompt_is_context_and_question_with_nothing_between():
    assert sample("a", "x").prompt == "once more"


def test_a_category_is_the_mean_of_its_subsets_and_not_of_its_samples():
    a, b, c = sample("a", "x"), sample("b", "x"), sample("c", "y")
    # a: 3 of 4, b: 0 of 1, c: 1 of 1; x: (75 + 0) / 2; average: (37.5 + 100) / 2
    rows = [(a, 1.0), (b, 0.0), (a, 1.0), (a, 1.0), (c, 1.0), (a, 0.0)]
    assert Parrot().summarize(rows) == [
        Row("a", "subset", 4, 75.0),
        Row("b", "subset", 1, 0.0),
        Row("c", "subset", 1, 100.0),
        Row("x", "category", 5, 37.5, "mean of 2 subsets"),
        Row("y", "category", 1, 100.0),
        Row("average", "average", 6, 68.75, "mean of 2 category means"),
    ]


def test_one_category_has_no_average_of_averages():
    rows = [(sample("a", "x"), 1.0), (sample("b", "x"), 0.5)]
    assert [row.name for row in Parrot().summarize(rows)] == ["a", "b", "x"]


def test_a_row_is_a_weight_per_sample():
    examples = [sample("a", "x"), sample("b", "y"), replace(sample("b", "y"), weight=3), sample("c", "y")]
    found = {(mean.kind, mean.name): mean.weights.tolist() for mean in Parrot().means(examples)}
    assert found == {
        ("subset", "a"): [1, 0, 0, 0],
        ("subset", "b"): [0, 0.25, 0.75, 0],
        ("subset", "c"): [0, 0, 0, 1],
        ("category", "x"): [1, 0, 0, 0],
        ("category", "y"): [0, 0.125, 0.375, 0.5],
        ("average", "average"): [0.5, 0.0625, 0.1875, 0.25],
    }


def test_parts_of_a_subset_stand_for_it_together_however_many_they_are():
    long = as_parts(sample("a", "x"), {"parts": {"turn 1": 1.0, "turn 2": 1.0, "turn 3": 1.0}})
    short = as_parts(sample("b", "x"), {"parts": {"turn 1": 0.0, "turn 2": 0.0}})
    rows = {row.name: row.score for row in Parrot().summarize([*long, *short])}
    assert rows["x"] == pytest.approx(50.0)


def test_one_row_stands_for_the_whole_task_and_controls_are_not_in_it():
    a, b, c = sample("a", "x"), sample("b", "x"), sample("c", "y")
    control = replace(c, tags={**c.tags, "subset": "d", "control": True})
    assert Parrot().whole([a, b, c, control]).weights.tolist() == [0.25, 0.25, 0.5, 0]
    assert Parrot().whole([control]).n == Parrot().whole([]).n == 0


def test_no_samples_make_an_empty_table():
    assert Parrot().summarize([]) == []


def test_a_task_without_a_score_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Task()
