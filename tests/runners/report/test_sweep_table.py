"""What a sweep prints: its plan, and which rows of its result table stand for a cell."""

from types import SimpleNamespace

import pytest

from runners.report.compare import Compared
from runners.report.sweep_table import dry_run, widest
from tasks.base import Row


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        # subsets and an average below them
        ([("a", "subset", 2), ("b", "subset", 2), ("c", "category", 4), ("average", "average", 4)], ["average"]),
        # the average first, single domains last
        ([("overall", "average", 4), ("easy", "category", 2), ("law", "subset", 3)], ["overall"]),
        # one kind of needle: lengths and depths are parts of it
        ([("single", "subset", 4), ("length 512", "category", 4), ("depth 100 %", "category", 2)], ["single"]),
        # turns and their mean
        ([("x turn 1", "subset", 3), ("x turn 2", "subset", 3), ("x, mean", "category", 6)], ["x, mean"]),
        # texts have no average, and bins are parts of them
        ([("a", "subset", 2), ("a 0-255", "bin", 2), ("b", "subset", 2), ("b 0-255", "bin", 2)], ["a", "b"]),
    ],
)
def test_the_widest_mean_stands_for_a_cell_and_where_there_is_none_every_subset(rows, shown):
    table = [Compared(Row(*row, score=1.0), Row(*row, score=1.0), None) for row in rows]
    assert [one.row.name for one in widest(table)] == shown


def planned(method: str, budget: float, lacking: int) -> SimpleNamespace:
    """A cell of a sweep's plan that lacks so many samples."""
    binds = "read" if method == "nacl" else "held"
    cell = SimpleNamespace(name=method, method=SimpleNamespace(budget=budget, binds=binds))
    record = SimpleNamespace(refresh=lambda: None, rows={})
    return SimpleNamespace(cell=cell, words=["method.window=8"] * (method != "full"), record=record, lacks=lacking)


def test_a_plan_says_of_every_cell_what_is_done_what_it_will_hold_and_with_whom_it_runs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    examples = [SimpleNamespace(id=str(i), error=None, max_new_tokens=4) for i in range(5)]
    shared, alone, finished = planned("full", 1, 3), planned("tova", 0.25, 2), planned("nacl", 0.5, 0)
    sizes = SimpleNamespace(
        tokens=lambda example: 10 + int(example.id),
        member_bytes=lambda method, longest: int(1024 * method.budget * (10 + int(longest[0].id))),
        split=lambda members, longest: [members],
    )
    dry_run(
        SimpleNamespace(
            members=[shared, alone, finished],
            sharing=[shared, finished],
            alone=[alone],
            why_alone=lambda member: "edits the model",
            lacking=lambda member, examples: examples[: member.lacks],
            sizes=sizes,
            run=SimpleNamespace(examples=examples, checkpoint=SimpleNamespace(parameters=1e6), device="cpu"),
        )
    )
    heads, _, *rows = [[word.strip() for word in line.split("  ") if word.strip()] for line in plan(capsys)]
    assert heads == ["method", "budget", "done", "to run", "KV bytes of the longest", "runs"]
    assert rows == [
        ["full", "1", "2", "3", "12 KiB", "in the group"],
        ["tova window=8", "0.25", "3", "2", "2.75 KiB", "alone: edits the model"],
        ["nacl window=8", "0.5 of reads", "5", "0", "-", "in the group"],
    ]


def plan(capsys) -> list[str]:
    """The lines of the table, without those below it."""
    table = capsys.readouterr().out.partition("group:")[0]
    return [line for line in table.splitlines() if line.strip()]
