"""The single command beside the full cache: a few samples alone for their speeds, the rest read once for both."""

import json
from pathlib import Path

import pytest

from methods.random import Random
from runners import pair
from runners.engine import answer
from tests.test_run import samples, without_times, write_rows, write_split

ALONE = "group.max_cells=1"


@pytest.fixture
def split(tmp_path) -> Path:
    return write_split(tmp_path / "split")


@pytest.fixture
def command(tmp_path, tiny_model_dir, split, run_command):
    """The command line on the tiny model and the split: command("budget=0.5", ...) -> (exit code, stdout, stderr)."""

    def run_it(*overrides: str, results: Path = tmp_path / "results") -> tuple[int, str, str]:
        return run_command(f"model.path={tiny_model_dir}", f"task.data={split}", f"results={results}", *overrides)

    return run_it


def together(results: Path, method: str = "nacl") -> list[str]:
    """Samples of a method that were answered in a group."""
    return [id for id, row in samples(results, method).items() if "group" in row]


@pytest.mark.parametrize("more", [(), ("batch_size=2", "protocol=agnostic"), ("chunk=16", "last_token=held")])
def test_shared_prompts_give_the_rows_of_two_runs_alone(command, tmp_path, more):
    long = f"task.data={write_split(tmp_path / 'long', samples=5)}"
    assert command(long, *more)[0] == 0
    code, out, _ = command(long, *more, ALONE, results=tmp_path / "alone")
    assert code == 0 and "(n=" not in out
    for method in ("full", "nacl"):
        ours, alone = samples(tmp_path / "results", method), samples(tmp_path / "alone", method)
        assert without_times(ours) == without_times(alone) and not together(tmp_path / "alone", method)
        assert {row.get("group") for row in ours.values()} == {None, 2} and len(together(tmp_path / "results")) == 6
    folders = [sorted(path.relative_to(tmp_path / folder) for path in (tmp_path / folder).glob("*/*/*/cell.json"))
               for folder in ("results", "alone")]  # fmt: skip
    assert folders[0] == folders[1] and len(folders[0]) == 2


def test_the_speed_rows_say_of_how_many_samples_they_are_and_these_are_spread(command, tmp_path):
    code, out, err = command()
    speeds = [line for line in out.splitlines() if "tokens/s" in line or "ms/token" in line]
    assert code == 0 and len(speeds) == 2 and all(line.count("(n=4)") == 2 for line in speeds), err
    assert together(tmp_path / "results") == together(tmp_path / "results", "full") == ["mat/2", "river/2"]
    assert "full and nacl: 2/2 samples" in err


def test_ctrl_c_among_shared_prompts_keeps_them_and_no_more_are_run_alone_than_before(command, tmp_path, monkeypatch):
    long = f"task.data={write_split(tmp_path / 'long', samples=5)}"
    command(long, results=tmp_path / "undisturbed")
    real, calls = answer.through, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(answer, "through", interrupted)
    code, _, err = command(long)
    assert code == 130 and "stopped; 6 samples of the full cache and 6 of nacl are kept" in err
    monkeypatch.setattr(answer, "through", real)
    code, out, _ = command(long)
    assert code == 0 and out.count("(n=4)") == 4
    for method in ("full", "nacl"):
        rows = samples(tmp_path / "results", method)
        assert without_times(rows) == without_times(samples(tmp_path / "undisturbed", method))
        assert len(together(tmp_path / "results", method)) == 6


def test_what_one_of_the_two_has_already_runs_alone(command, tmp_path):
    command("task.limit=2")
    assert command("method=snapkv", "task.limit=2")[0] == 0
    assert not together(tmp_path / "results", "snapkv")
    code, _, err = command("method=snapkv")  # two samples more, which neither has; four ran alone before
    assert code == 0 and together(tmp_path / "results", "snapkv") == ["mat/2", "river/2"]
    assert "full: 4 of 6 samples are on disk" in err and "snapkv: 4 of 6 samples are on disk" in err


@pytest.mark.parametrize("words", [("method=full",), ("method=streaming_llm", "method.prefill=streaming"), (ALONE,)])
def test_who_cannot_share_runs_alone(command, tmp_path, words):
    assert command(*words)[0] == 0
    assert not together(tmp_path / "results", words[0].partition("=")[2] if "method" in words[0] else "nacl")


def test_a_sample_that_cannot_be_run_costs_the_others_nothing(command, tmp_path, split):
    rows = [json.loads(line) for line in (split / "river.jsonl").read_text().splitlines()]
    write_rows(split / "river.jsonl", [*rows[:2], {**rows[2], "context": 7}])
    code, _, err = command()
    assert code == 1 and "failed: 1 of 6 samples with nacl" in err
    assert sum("error" not in row for row in samples(tmp_path / "results").values()) == 5
    assert len(together(tmp_path / "results")) == 1


def test_a_budget_that_is_missed_in_a_group_stops_the_run(command, monkeypatch):
    monkeypatch.setattr(pair, "ALONE", 0)
    code, out, err = command("method=snapkv", "budget=0.05", "budget_miss=fail")
    assert code == 1 and "budget=0.05 is missed and budget_miss=fail: snapkv: " in err and "average" not in out


def test_a_method_that_edits_the_model_waits_for_the_full_cache(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Random, "edits_model", True)
    assert command("method=random")[0] == 0
    assert not together(tmp_path / "results", "random") and not together(tmp_path / "results", "full")
