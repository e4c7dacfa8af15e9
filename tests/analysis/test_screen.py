"""Tables that fit the screen they are printed on."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from analysis import screen

ROOT = Path(__file__).parents[2]
ROWS = [
    ("full", "1", "132", "97.14", "-", "-", "100.0%", "-"),
    ("snapkv window=16 kernel=5", "0.25", "132", "67.51", "-29.63", "-36.08 to -23.21", "25.1%", "count -40.91"),
]
NAMES = ("method", "budget", "n", "score", "difference", "95 % interval", "KV bytes", "worst")


def printed(rows, names, width, **settings):
    made = screen.new_table(*names, left=("worst",))
    for row in rows:
        made.add_row(*row)
    console = Console(file=io.StringIO(), width=width, **settings)
    console.print(screen.fitted(made, console))
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())


@pytest.mark.parametrize("width", [160, 80, 60])
@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "no_color": True}])
def test_every_name_and_number_is_whole_and_no_line_is_longer_than_the_screen(width, settings):
    text = printed(ROWS, NAMES, width, **settings)
    for word in [*NAMES, *(cell for row in ROWS for cell in row)]:
        assert word in text
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_table_that_fits_has_one_line_to_a_row():
    lines = [line for line in printed(ROWS, NAMES, 160).splitlines() if line.strip()]
    assert len(lines) == 2 + len(ROWS)


def test_one_that_does_not_fit_is_stacked_in_as_few_lines_as_will_do():
    lines = [line.split() for line in printed(ROWS, NAMES, 80).splitlines() if line.strip()]
    assert lines[0][0] == "method" and lines[4][0] == "full"
    assert len(lines) == 3 + 1 + 3 * len(ROWS)


def test_a_name_longer_than_the_screen_is_folded_and_loses_nothing():
    name = "+".join(["snapkv"] * 12)
    text = printed([(name, *ROWS[0][1:])], NAMES, 50)
    assert max(map(len, text.splitlines())) <= 50
    assert name in "".join(line.split(" ")[1] for line in text.splitlines() if line.strip())


def test_without_a_terminal_or_columns_a_table_is_made_for_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    made = screen.new_table(*NAMES)
    for row in ROWS:
        made.add_row(*row)
    screen.print_table(made, file)
    assert max(map(len, file.getvalue().splitlines())) <= 80 and "-36.08 to -23.21" in file.getvalue()


def test_a_terminal_without_the_letters_of_a_name_gets_their_escapes():
    code = (
        "from analysis import screen; screen.any_text(); made = screen.new_table('模型', 'n'); "
        "made.add_row('河', '1'); screen.print_table(made); print('模型')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=ROOT
    )
    assert done.returncode == 0 and b"\\u6a21\\u578b" in done.stdout, done.stderr
