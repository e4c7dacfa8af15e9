"""What leaves the machine: files that are whole, and tables that nothing else takes for something else."""

import csv
import errno
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis import compare, frontier, leaderboard, report, tables
from analysis.files import CannotWrite, picture, write, write_csv
from analysis.pages import latex
from runners.report import heat_map, latency_report


def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_earlier_file_stays_whole_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(path, "earlier")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CannotWrite, match=r"report\.html: cannot be written \(No space left on device\); give another"):
        write(path, "later")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", [frontier, report])
def test_a_place_that_cannot_be_written_is_one_line_and_leaves_the_earlier_file(book, capsys, command, monkeypatch):
    book.cell(scores=[1.0, 1.0, 0.0])
    book.cell("nacl", [0.0, 1.0, 0.0], 0.5)
    earlier = book.root / ("report.html" if command is report else "frontier.png")
    earlier.write_text("earlier")
    monkeypatch.setattr(Path, "replace", full)
    assert command.main([str(book.root)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "cannot be written (No space left on device)" in said[-1] and earlier.read_text() == "earlier"
    assert not list(book.root.glob(".report*")) and not list(book.root.glob(".frontier*"))
    monkeypatch.undo()
    blocked = book.root / "file"
    blocked.write_text("")
    out = ["--out", str(blocked / "below" / "report.html")]
    assert command.main([str(book.root), *out]) == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("main", [frontier.main, report.main, heat_map.main, latency_report.main])
@pytest.mark.parametrize("out", ["file/below/a.png", "dangling/a.png", "/proc/nothing/a.png"])
def test_an_out_that_cannot_be_written_is_one_line_that_names_it_before_anything_is_read(
    tmp_path, capsys, monkeypatch, main, out
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("/nowhere/x")
    monkeypatch.setattr(sys, "argv", ["x", "no/such/record", "--out", out])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    (said,) = capsys.readouterr().err.splitlines()
    assert code == 2 and f"--out={out}: cannot be written (" in said and said.endswith("; give another place")


def test_an_out_that_is_a_folder_or_no_picture_is_named_and_one_without_a_kind_is_a_png(tmp_path):
    with pytest.raises(CannotWrite, match=f"--out={tmp_path}: is a folder"):
        picture(tmp_path)
    with pytest.raises(CannotWrite, match=r"map\.txt: is no kind of picture; end it in"):
        picture(tmp_path / "map.txt")
    assert picture(None) is None and picture(tmp_path / "map") == tmp_path / "map.png"


def test_no_text_of_a_csv_file_begins_a_formula_and_numbers_stay_numbers(tmp_path):
    table = pd.DataFrame({"label": ["=1+1", "+x", "-x", "@x", "\tx", "nacl"], "=n": [-1.5, 2.0, 0.0, 1.0, 1.0, 1.0]})
    write_csv(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["label", "'=n"] and [row[0] for row in rows] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "nacl"]
    assert rows[0][1] == "-1.5"


def test_line_breaks_in_names_break_no_row(book):
    name = "a\nb\r\nc\u2028d|e"
    text = frontier.markdown(pd.DataFrame({name: [name]}))
    assert len(text.splitlines()) == 3 and text.splitlines()[2] == "| a b c d\\|e |"
    assert len(latex.escaped(name).splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (frontier, ["results", "--out", ""]),
        (frontier, [""]),
        (report, ["results", "--out", " "]),
        (report, [""]),
        (leaderboard, [""]),
        (compare, ["a", "b", "--results", ""]),
        (tables, [""]),
        (tables, ["results", "--expected", ""]),
        (heat_map, ["record", "--out", ""]),
        (latency_report, ["record", "--out", ""]),
    ],
)
def test_an_empty_path_is_refused_by_name_and_not_taken_for_the_working_folder(
    command, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit) as end:
        command.main(*([] if command in (heat_map, latency_report) else [words]))
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "the path is empty" in said and (words[-2] if len(words) > 1 else "results") in said
    assert not list(tmp_path.iterdir())
