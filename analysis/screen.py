"""Tables on a screen of any width: what does not fit is stacked, so that no name and no number is ever cut off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from math import ceil
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

#: columns that the first one is given at least, however many lines its names then take
NARROWEST = 16


def any_text() -> None:
    """From here on a terminal or pipe that cannot show a letter gets its escape, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def new_table(*names: str, left: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table; the first column and those named in `left` are flush left, numbers flush right."""
    table = _empty(title)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 or name in left else "right", overflow="fold")
    return table


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Print a table as wide as the screen is: its terminal, or COLUMNS, or 80 where there is neither."""
    console = Console(file=file, highlight=False)
    console.print(fitted(table, console))


def fitted(table: Table, console: Console) -> Table:
    """The table itself where it fits, else the same cells with several lines to a row, in as few as will do."""
    for lines in range(1, len(table.columns)):
        shown = _stacked(table, lines)
        if _natural(shown, console) <= console.width:
            return shown
    narrow = _stacked(table, max(1, len(table.columns) - 1))
    rest = _natural(narrow, console) - _widest(table, console)
    # only the names are left to fold
    narrow.columns[0].max_width = max(NARROWEST, console.width - rest)
    return narrow


def _stacked(table: Table, lines: int) -> Table:
    """The cells behind the first column dealt out over so many lines; the header is dealt out in the same way."""
    if lines == 1:
        return table
    first, *others = table.columns
    width = ceil(len(others) / lines)
    shown = _empty(table.title)
    shown.add_column(_lined([str(first.header)], lines), justify=first.justify, overflow="fold")
    for at in range(width):
        mine = others[at::width]
        header = _lined([str(column.header) for column in mine], lines)
        shown.add_column(header, justify=mine[0].justify, overflow="fold")
    cells = [list(column.cells) for column in table.columns]
    for row in range(table.row_count):
        texts = [str(column_cells[row]) for column_cells in cells]
        shown.add_row(texts[0], *(_lined(texts[1:][at::width], lines) for at in range(width)), end_section=True)
    return shown


def _empty(title: Any) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")


def _lined(texts: Sequence[str], lines: int) -> str:
    return "\n".join([*texts, *[""] * (lines - len(texts))])


def _natural(shown: Table, console: Console) -> int:
    """Columns of the screen that the table takes when nothing in it is folded."""
    return Measurement.get(console, console.options.update(max_width=10_000), shown).maximum


def _widest(table: Table, console: Console) -> int:
    """Columns that the longest name takes."""
    names: list[Any] = [table.columns[0].header, *table.columns[0].cells]
    return max(Measurement.get(console, console.options.update(max_width=10_000), name).maximum for name in names)
