"""Committed tables, and the README made from them."""

import json
import re
from pathlib import Path

import pytest

from analysis import tables
from analysis.load import NothingToRead, load

README = Path(__file__).resolve().parents[2] / "README.md"


def fill(book):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [1.0] * 8, 0.5)
    book.cell("nacl", [0.0] * 7 + [1.0], 0.25)
    book.cell(scores=[1.0] * 4, task="other-mini")
    book.cell("random", [0.0] * 4, 0.5, task="other-mini")


def test_a_table_has_a_line_per_method_and_budget_and_ties_in_bold(book):
    fill(book)
    lines = tables.grid(tables.snapshot(load(book.root), "")).splitlines()
    assert lines[0] == "| method | budget | bytes held | other-mini | quiz-mini |"
    assert lines[2] == "| full | 1 | 100.0% | 100.0 | 100.0 |"
    assert lines[3] == "| nacl | 0.5 | 50.0% |  | **100.0** |"
    assert lines[4].startswith("| nacl | 0.25 | 25.0% |  | 12.5 (-100, ")
    assert lines[5] == "| random | 0.5 | 50.0% | 0.0 (-100, -100) |  |"


def test_a_readme_is_filled_between_its_marks(book, tmp_path):
    fill(book)
    (tmp_path / "quiz.json").write_text(json.dumps(tables.snapshot(load(book.root), "python run.py")))
    text = "before\n<!-- table: quiz -->\nold\n<!-- end -->\nafter\n"
    made = tables.fill(text, tmp_path)
    assert "old" not in made and made.startswith("before\n") and made.endswith("\nafter\n")
    assert "| nacl | 0.5 |" in made and "`python run.py`, n = 4 (other-mini), 8 (quiz-mini)" in made
    assert tables.fill(made, tmp_path) == made
    with pytest.raises(NothingToRead, match=r"quiz\.json: no such file"):
        tables.fill(text, tmp_path / "nowhere")


def test_the_readme_holds_what_the_committed_files_say():
    text = README.read_text()
    made = tables.fill(text, README.parent / "benchmarks")
    # a new method is two files: its row in the list comes with the next tables
    books = [block.group() for block in tables.BLOCK.finditer(text) if block["name"] != "methods"]
    assert len(books) >= 2 and all(block in made for block in books)


def test_the_command_needs_something_to_do(capsys):
    with pytest.raises(SystemExit):
        tables.main([])
    assert "--readme" in capsys.readouterr().err


def test_every_method_is_in_the_list_with_its_paper():
    text = tables.methods(README.parent)
    for path in (README.parent / "conf" / "method").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text
    assert re.search(r"`snapkv` \| keep the prompt slots .* \| Li et al\. 2024, arXiv:2404\.14469", text)


def test_a_method_that_is_an_allocator_cites_the_allocators_paper():
    row = next(line for line in tables.methods(README.parent).splitlines() if line.startswith("| `adakv`"))
    assert "arXiv:2407.11550" in row
