"""One entry point for all commands of analysis, whose old command lines keep working."""

import importlib
import io
import re
import sys
from pathlib import Path

import pytest

from analysis import command
from analysis.files import CannotWrite
from analysis.load import NothingToRead

FOLDER = Path(command.__file__).parent


@pytest.mark.parametrize("name", command.NAMES)
def test_a_command_says_what_it_takes_under_both_of_its_names(name, capsys):
    said = []
    for main, words in ((command.main, [name, "--help"]), (importlib.import_module(f"analysis.{name}").main, ["-h"])):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"python -m analysis.{name}" in said[0] and "--all-generations" in said[0]


def test_a_command_reads_a_folder_under_both_of_its_names(book, tmp_path, capsys):
    book.cell(scores=[1.0, 0.0, 1.0])
    book.cell("nacl", [1.0, 0.0, 0.0], 0.5)
    from analysis import leaderboard

    assert command.main(["leaderboard", str(book.root)]) == 0
    first = capsys.readouterr().out
    assert leaderboard.main([str(book.root)]) == 0
    assert capsys.readouterr().out == first != ""


def test_what_is_no_command_is_named_with_those_there_are(capsys, tmp_path):
    assert command.main(["fronteer"]) == 2
    assert capsys.readouterr().err == (
        "analysis: no command fronteer; give one of frontier, report, compare, leaderboard, audit, heads, tables, "
        "or --help\n"
    )
    assert command.main([]) == 2 and "no command is given" in capsys.readouterr().err
    for word in ("--help", "-h"):
        assert command.main([word]) == 0
        shown = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +\S", shown, re.M) for name in command.NAMES)
    assert command.main(["report", str(tmp_path / "nowhere")]) == 2
    assert re.fullmatch(r"report: .*nowhere: no such folder; .*\n", capsys.readouterr().err)


def test_what_several_commands_take_is_declared_once():
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py")}
    for option in ('"--all-generations"', '"--out"', '"--markdown"', "ArgumentParser("):
        assert [name for name, text in texts.items() if option in text] == ["command.py"], option


def test_a_command_is_given_what_was_typed_or_its_defaults(tmp_path, capsys):
    given = []

    def run(options) -> int:
        given.append(vars(options))
        return 3

    def options(parser) -> None:
        parser.add_argument("--pairs", type=int)

    one = command.Command("one", "About.\nMore.", run, options, "records", False, command.RESULTS, "a folder", True)
    typed = [str(tmp_path), "--out", "x", "--markdown", "--all-generations", "--pairs", "4"]
    assert [one.main([]), one.main(typed)] == [3, 3]
    refuse, _ = (options.pop("refuse") for options in given)
    assert given == [
        {"results": Path("results"), "pairs": None, "out": None, "markdown": False, "all_generations": False},
        {"results": tmp_path, "pairs": 4, "out": Path("x"), "markdown": True, "all_generations": True},
    ]
    needing = command.Command("two", "About.", run, options, "records", True)
    for wrong in ([], ["x", "--markdown"], ["x", "--out", "y"]):
        with pytest.raises(SystemExit) as end:
            needing.main(wrong)
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        refuse("one of them")
    said = capsys.readouterr().err
    assert "analysis.one: error: one of them" in said and "required: results" in said
    assert "unrecognized arguments: --markdown" in said and "unrecognized arguments: --out y" in said
    with pytest.raises(SystemExit):
        one.main(["--help"])
    assert "About." in (said := capsys.readouterr().out) and "More." not in said


@pytest.mark.parametrize("wrong", [NothingToRead("no record"), CannotWrite("no place")])
def test_what_a_command_cannot_do_is_one_line_and_exit_code_2(wrong, capsys):
    def run(options) -> int:
        raise wrong

    assert command.Command("one", "About.", run, lambda parser: None).main([]) == 2
    assert capsys.readouterr().err == f"one: {wrong}\n"


def test_a_letter_that_the_screen_does_not_have_is_its_escape(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert command.Command("one", "About.", lambda options: print("naïve") or 0, lambda parser: None).main([]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"na\\xefve\n"


def test_without_arguments_it_reads_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["analysis", "report", str(tmp_path / "nowhere")])
    assert command.main() == 2 and "no such folder" in capsys.readouterr().err
