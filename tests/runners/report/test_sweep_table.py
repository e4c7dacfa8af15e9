"""Which rows of its result table stand for a cell in the table of a sweep."""

import pytest

from runners.report.compare import Compared
from runners.report.sweep_table import widest
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
