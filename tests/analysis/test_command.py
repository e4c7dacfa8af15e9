"""One entry point for all commands of analysis, whose old command lines keep working."""

import importlib
import re
from pathlib import Path

import pytest

from analysis import command

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
        "analysis: no command fronteer; give one of frontier, report, compare, leaderboard, tables, or --help\n"
    )
    assert command.main([]) == 2 and "no command is given" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
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
    for wrong in (lambda: refuse("one of them"), lambda: needing.main([]), lambda: needing.main(["x", "--markdown"])):
        with pytest.raises(SystemExit) as end:
            wrong()
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert "analysis.one: error: one of them" in said and "required: results" in said and "--markdown" in said


def test_without_arguments_it_reads_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["analysis", "report", str(tmp_path / "nowhere")])
    assert command.main() == 2 and "no such folder" in capsys.readouterr().err
