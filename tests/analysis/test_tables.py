"""Committed tables, and the pages made from them."""

import json
import re
from pathlib import Path

import pytest

from analysis import tables
from analysis.load import NothingToRead, load_results

ROOT = Path(__file__).resolve().parents[2]


def fill(book):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [1.0] * 8, 0.5)
    book.cell("nacl", [0.0] * 7 + [1.0], 0.25)
    book.cell(scores=[1.0] * 8, task="other-mini")
    book.cell("random", [0.0] * 8, 0.5, task="other-mini")


def test_a_table_has_a_line_per_method_and_budget_and_ties_in_bold(book):
    fill(book)
    lines = tables.grid(tables.snapshot(load_results(book.root), "")).splitlines()
    assert lines[0] == "| method | budget | bytes held | other-mini | quiz-mini |"
    assert lines[2] == "| full | 1 | 100.0% | 100.0 | 100.0 |"
    assert lines[3] == "| nacl | 0.5 | 50.0% |  | **100.0** (+0, +0) |"
    assert lines[4].startswith("| nacl | 0.25 | 25.0% |  | 12.5 (-100, ")
    assert lines[5] == "| random | 0.5 | 50.0% | 0.0 (-100, -100) |  |"


def test_what_a_paper_claims_stands_in_the_first_line_of_its_method(book):
    fill(book)
    made = tables.snapshot(load_results(book.root), "", {"nacl": "half is enough"})
    assert [row["expected"] for row in made["points"] if row["label"] == "nacl"] == ["half is enough"] * 2
    lines = tables.grid(made).splitlines()
    assert lines[0].endswith("| the paper's claim |")
    assert lines[3].endswith("| half is enough |") and lines[4].endswith("|  |") and lines[5].endswith("|  |")


def test_cells_that_name_their_bits_have_a_line_each(book):
    book.cell(scores=[1.0] * 16)
    for bits, scores in ((4, [1.0] * 16), (2, [0.0] * 16)):
        book.cell("kivi", scores, config={"key_bits": bits, "value_bits": bits}, share=bits / 16)
    book.cell("kivi", [1.0] * 13 + [0.0] * 3, config={"key_bits": 4, "value_bits": 2}, share=3 / 16)
    for table, share in (("tables/C3.25.yaml", 0.2), ("C2.25", 0.14), ("C2.50", 0.15)):
        book.cell("kvtuner", [1.0] * 16, config={"table": table}, share=share)
    lines = tables.grid(tables.snapshot(load_results(book.root), "")).splitlines()
    assert [line.split(" (")[0] for line in lines[3:]] == [
        "| kivi | 4 bits | 25.0% | **100.0**",
        "| kivi | K4V2 | 18.8% | **81.2**",
        "| kivi | 2 bits | 12.5% | 0.0",
        "| kvtuner | C3.25 | 20.0% | **100.0**",
        "| kvtuner | C2.50 | 15.0% | **100.0**",
        "| kvtuner | C2.25 | 14.0% | **100.0**",
    ]


def test_a_page_is_filled_between_its_marks(book, tmp_path):
    fill(book)
    (tmp_path / "quiz.json").write_text(json.dumps(tables.snapshot(load_results(book.root), "python run.py")))
    text = "before\n<!-- table: quiz -->\nold\n<!-- end -->\nafter\n"
    made = tables.fill(text, tmp_path)
    assert "old" not in made and made.startswith("before\n") and made.endswith("\nafter\n")
    assert "| nacl | 0.5 |" in made and "`python run.py`, n = 8 (other-mini), 8 (quiz-mini)" in made
    assert tables.fill(made, tmp_path) == made
    with pytest.raises(NothingToRead, match=r"quiz\.json: no such file"):
        tables.fill(text, tmp_path / "nowhere")


def test_claims_say_what_was_measured_and_which_of_three_verdicts_each_comparison_gives(tmp_path):
    held, not_held, open_ = tables.VERDICTS
    better = {"what": "8x", "value": 2.25, "low": 1.0, "high": 5.5, "unit": "points of 100", "n": 8, "verdict": held}
    worse = {**better, "what": "16x", "value": -3.0, "low": -5.5, "high": -1.0, "verdict": not_held}
    tie = {**better, "what": "32x", "low": -1.0, "verdict": open_, "seeds": 3}
    left = {"what": "quiz", "value": 96.0, "low": 94.0, "high": 98.0, "unit": "%", "n": 8, "verdict": open_}
    claims = [
        {"method": "a", "claim": "above b", "rows": [better, worse, tie, tie]},
        {"method": "a", "claim": "much is left", "rows": [left]},
        {"method": "a", "claim": "above c", "rows": [worse]},
    ]
    (tmp_path / "said.json").write_text(json.dumps({"command": "python x.py", "claims": claims}))
    lines = tables.fill("<!-- table: said -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[4:7] == [
        "| `a` | above b | 8x: +2.2 (+1.0 to +5.5); 16x: -3.0 (-5.5 to -1.0); 32x: +2.2 (-1.0 to +5.5, 3 seeds); "
        "32x: +2.2 (-1.0 to +5.5, 3 seeds) | held in 1 of 4, not held in 1 of 4, cannot be told here in 2 of 4 |",
        "| `a` | much is left | quiz: 96.0 % (94.0 to 98.0) | cannot be told here |",
        "| `a` | above c | 16x: -3.0 (-5.5 to -1.0) | not held |",
    ]
    assert "`python x.py`" in lines


def test_a_figure_is_shown_with_its_command_once_it_is_there(book, tmp_path):
    text = "<!-- figure: quiz -->\n<!-- end -->\n"
    assert tables.fill(text, tmp_path) == text
    fill(book)
    (tmp_path / "quiz.json").write_text(json.dumps(tables.snapshot(load_results(book.root), "python run.py")))
    made = tables.fill(text, tmp_path)
    assert (
        "(benchmarks/results/quiz.png)" in made and "`python run.py`, n = 8 (other-mini), 8 (quiz-mini); every" in made
    )
    assert "benchmarks/results/quiz.parquet" in made and tables.fill(made, tmp_path) == made
    assert "(../benchmarks/results/quiz.png)" in tables.fill(text, tmp_path, ROOT / "docs")


def test_the_pages_hold_what_the_committed_files_say():
    # a new method is two files: its row in the list comes with the next tables
    books = {"methods"}
    for page in tables.pages():
        text = page.read_text()
        made = tables.fill(text, ROOT / "benchmarks" / "results", page.parent)
        blocks = {block["name"]: block.group() for block in tables.BLOCK.finditer(text)}
        assert [name for name, block in blocks.items() if block not in made and name != "methods"] == []
        books |= set(blocks)
    assert books == {"methods", *(path.stem for path in ROOT.glob("benchmarks/results/*.json") if is_table(path))}


def is_table(path: Path) -> bool:
    """Whether the file is points or claims, not times."""
    return bool({"points", "claims"} & set(json.loads(path.read_text())))


@pytest.mark.parametrize("flag", ["--pages", "--readme"])
def test_every_page_with_marks_is_written_again_and_the_others_are_left_alone(book, tmp_path, monkeypatch, flag):
    fill(book)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    marks = "<!-- table: quiz -->\n<!-- end -->\n<!-- figure: quiz -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(f"# Short\n{marks}")
    (tmp_path / "docs" / "results.md").write_text(f"# Long\n{marks}")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    before = (tmp_path / "docs" / "other.md").stat().st_mtime_ns
    monkeypatch.setattr(tables, "HOME", tmp_path)
    assert tables.main([str(book.root), "--name", "quiz", flag]) == 0
    for page, link in (
        ("README.md", "benchmarks/results/quiz.png"),
        ("docs/results.md", "../benchmarks/results/quiz.png"),
    ):
        text = (tmp_path / page).read_text()
        assert "| nacl | 0.5 |" in text and f"({link})" in text
    assert (tmp_path / "docs" / "other.md").stat().st_mtime_ns == before


def test_no_page_is_touched_when_a_table_of_one_is_not_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- table: quiz -->\n<!-- end -->\n")
    (tmp_path / "docs" / "a.md").write_text("<!-- table: none -->\n<!-- end -->\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "quiz.json").write_text(json.dumps({"command": "x", "claims": []}))
    monkeypatch.setattr(tables, "HOME", tmp_path)
    assert tables.main(["--pages"]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "<!-- table: quiz -->\n<!-- end -->\n"


def test_the_command_writes_the_points_and_the_samples_behind_them(book, tmp_path, monkeypatch, capsys):
    fill(book)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(tables, "HOME", tmp_path)
    assert tables.main([str(book.root), "--name", "quiz", "--command", "python run.py"]) == 0
    made = json.loads((tmp_path / "benchmarks" / "results" / "quiz.json").read_text())
    again = tables.snapshot(load_results(tmp_path / "benchmarks" / "results" / "quiz.parquet"), "python run.py")
    assert made == again and made["points"] and "quiz.parquet" in capsys.readouterr().out


def test_earlier_points_stay_whole_on_a_full_disk(book, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    fill(book)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (earlier := tmp_path / "benchmarks" / "results" / "quiz.json").write_text("earlier")
    monkeypatch.setattr(tables, "HOME", tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert tables.main([str(book.root), "--name", "quiz"]) == 2
    assert "quiz.json: cannot be written (No space left on device)" in capsys.readouterr().err
    assert earlier.read_text() == "earlier"


def test_the_command_needs_something_to_do(capsys):
    with pytest.raises(SystemExit):
        tables.main([])
    assert "--pages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"), [(None, "cannot be read"), ("a: [1", "cannot be read"), ("a claim", "needs lines of `method: ")]
)
def test_claims_that_cannot_be_read_are_named_before_anything_is_written(
    book, tmp_path, monkeypatch, capsys, text, why
):
    monkeypatch.setattr(tables, "HOME", tmp_path)
    claims = tmp_path / "claims.yaml"
    if text is not None:
        claims.write_text(text)
    with pytest.raises(SystemExit) as end:
        tables.main([str(book.root), "--name", "x", "--expected", str(claims)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"--expected={claims}: {why}" in said and not (tmp_path / "benchmarks").exists()


def test_every_method_is_in_the_list_with_its_paper():
    text = tables.methods(ROOT)
    for path in (ROOT / "conf" / "method").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text
    assert re.search(r"`snapkv` \| keep the prompt slots .* \| Li et al\. 2024, arXiv:2404\.14469", text)


def test_a_method_that_is_an_allocator_cites_the_allocators_paper():
    row = next(line for line in tables.methods(ROOT).splitlines() if line.startswith("| `adakv`"))
    assert "arXiv:2407.11550" in row
