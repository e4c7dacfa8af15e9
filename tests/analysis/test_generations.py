"""Which of several records of one cell is drawn: the newest code's, and what is said of the others."""

import shutil
from pathlib import Path

import pytest

from analysis import frontier
from analysis.load import load_results

FORMAT_1 = Path(__file__).parent / "format_1"  # written by commit 4be9054
BEFORE, AFTER = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


@pytest.fixture
def edited(book):
    """A method whose code was changed, and its two records; the full cache's code was not."""
    book.cell(scores=[1.0, 1.0], began=BEFORE)
    book.cell("nacl", [0.0, 1.0], 0.5, code="later", began=AFTER)
    book.cell("nacl", [1.0, 1.0], 0.5, code="sooner", began=BEFORE)
    return book


def test_the_newest_generation_is_drawn_and_the_others_are_named_in_one_line(edited):
    found = load_results(edited.root)
    assert sorted(found.cells["method"]) == ["full", "nacl"]
    assert found.by_cell[found.cells.query("method == 'nacl'").index[0]]["score"].tolist() == [0.0, 1.0]
    (said,) = found.problems
    assert "nacl-b0.5" in said and "--all-generations" in said


def test_all_generations_are_shown_on_request_each_as_a_curve_of_its_own(edited, capsys):
    assert frontier.main([str(edited.root), "--all-generations", "--out", str(edited.root)]) == 0
    page = (edited.root / "frontier.md").read_text()
    assert "| nacl |" in page and "| nacl@sooner |" in page and "left out" not in capsys.readouterr().err


def test_a_generation_that_has_finished_nothing_yet_hides_no_other(book):
    book.cell(scores=[1.0], began=BEFORE)
    book.cell("nacl", [1.0], 0.5, code="sooner", began=BEFORE)
    book.cell("nacl", [None], 0.5, code="later", began=AFTER)
    found = load_results(book.root)
    assert found.finished["score"].tolist() == [1.0, 1.0] and len(found.problems) == 1


def test_other_weights_in_the_same_place_are_a_generation_and_elsewhere_another_model(book):
    book.cell(weights="sha256:1", place="a", began=BEFORE)
    book.cell(weights="sha256:2", place="a", began=AFTER)
    assert load_results(book.root).cells["model"].tolist() == ["tiny"]
    book.cell(weights="sha256:3", place="b", began=BEFORE)
    assert sorted(load_results(book.root).cells["model"]) == ["tiny (weights=2)", "tiny (weights=3)"]


def test_a_method_that_was_not_run_again_is_not_paired_with_a_full_cache_of_other_files(book):
    book.cell(files="old", place="a", began=BEFORE)
    book.cell("nacl", [0.0], 0.5, files="old", place="a", began=BEFORE)
    book.cell(files="new", place="a", began=AFTER)
    found = load_results(book.root)
    assert sorted(found.cells["model"]) == ["tiny (files=new)", "tiny (files=old)"]
    assert sorted(load_results(book.root, all_generations=True).cells["method"]) == ["full", "full", "nacl"]


def test_a_record_written_before_generations_is_read(tmp_path):
    shutil.copytree(FORMAT_1, tmp_path, dirs_exist_ok=True)
    found = load_results(tmp_path)
    assert not found.problems and sorted(found.cells["method"]) == ["full", "nacl"]
    assert found.by_cell[found.cells.query("method == 'nacl'").index[0]]["score"].tolist() == [0.0, 1.0, 0.0]
    assert found.cells["weights"].unique().tolist() == ["sha256:5b7a78db16355bfb"]


def test_a_record_written_before_generations_is_older_than_one_written_since(book):
    for cell in ("full", "nacl"):
        (folder,) = FORMAT_1.glob(f"*/*/{cell}-*")
        shutil.copytree(folder, book.root / cell)
        text = (folder / "cell.json").read_text()
        newer = text.replace('   "weights": "sha256:5b7a78db16355bfb",\n', "").replace('"format": 1', '"format": 2')
        newer = newer.replace('"code":', '"weights": "sha256:5b7a78db16355bfb", "files": "f", "code":')
        newer = newer.replace('"commit"', f'"began": "{AFTER}", "place": "p", "commit"')
        shutil.copytree(folder, book.root / f"{cell}-new")
        (book.root / f"{cell}-new" / "cell.json").write_text(newer)
    found = load_results(book.root)
    assert sorted(found.cells.index) == ["full-new", "nacl-new"] and found.cells["model"].unique().tolist() == [
        "reference"
    ]
    # the full cache's stays, since the method's older record has nothing else beside it
    shutil.rmtree(book.root / "nacl-new")
    found = load_results(book.root)
    assert sorted(found.cells.index) == ["full-new", "nacl"] and found.cells["model"].unique().tolist() == ["reference"]
