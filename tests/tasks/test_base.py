from typing import Any

import pytest

from tasks.base import Example, Row, Task, percent


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


def test_percent_is_exact_and_knows_no_mean_of_nothing():
    assert percent([1, 0, 0]) == 100 / 3
    assert percent([]) is None


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


def test_every_row_counts_the_samples_whose_groups_name_it():
    rows = [(sample("a", "x"), 1.0), (sample("b", "y"), 0.0), (sample("b", "y"), 0.0)]
    for row in Parrot().summarize(rows):
        assert row.n == sum((row.kind, row.name) in Parrot().groups(example) for example, _ in rows)


def test_no_samples_make_an_empty_table():
    assert Parrot().summarize([]) == []


def test_a_task_without_a_score_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Task()
