"""Sweeps from end to end: groups, records equal to single runs, resume, sharing, failures."""

import json
import os
import random
import re
import resource
import shlex
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl

import run
from methods import method_names
from methods.core.errors import BudgetMiss
from methods.core.eviction import EvictionCache
from methods.core.meter import Report
from methods.random import Random
from methods.snapkv import SnapKV
from runners import model_setup, sweep
from runners.engine.loading import load_model
from tests.bounds import losses_off, near
from tests.rows import timeless
from tests.tasks.choice_items import write
from tests.test_run import write_split

ROOT = Path(run.__file__).parent
GRID = ("-m", "method=full,nacl,snapkv", "budget=0.5,0.2")
PATIENCE = 120  # seconds for a sweep of a process of its own


@pytest.fixture(autouse=True)
def no_model_is_kept():
    sweep.loaded.cache_clear()


@pytest.fixture
def split(tmp_path) -> Path:
    return write_split(tmp_path / "split")


@pytest.fixture
def command(tmp_path, tiny_model_dir, split, run_command):
    """The command line on the tiny model and the split: command("-m", "budget=0.5,0.2", ...) -> (exit code, ...)."""

    def run_it(*overrides: str, results: Path | str = tmp_path / "results") -> tuple[int, str, str]:
        return run_command(f"model.path={tiny_model_dir}", f"task.data={split}", f"results={results}", *overrides)

    return run_it


def records(results: Path) -> dict[str, list[dict]]:
    """Rows of every cell, by the cell's folder."""
    found = {}
    for path in sorted(results.glob("*/*/*/samples.jsonl")):
        found[path.parent.name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def without_times(rows: list[dict]) -> dict[str, dict]:
    """The rows by sample, without what depends on who shared a pass; fails if a sample is there twice."""
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: timeless(row) for row in rows}


def comparable(results: Path) -> dict[str, dict[str, dict]]:
    return {cell: without_times(rows) for cell, rows in records(results).items()}


def test_a_sweep_writes_the_records_of_its_single_runs(command, tmp_path):
    assert command(*GRID, "protocol=agnostic")[0] == 0
    for method, budget in [("nacl", 0.5), ("nacl", 0.2), ("snapkv", 0.5), ("snapkv", 0.2)]:
        assert command(f"method={method}", f"budget={budget}", "protocol=agnostic", results=tmp_path / "alone")[0] == 0
    assert comparable(tmp_path / "results") == comparable(tmp_path / "alone")
    grouped = records(tmp_path / "results")
    assert len(grouped) == 5 and {row["group"] for rows in grouped.values() for row in rows} == {5}
    conditions = [
        [json.loads(path.read_text()) for path in sorted((tmp_path / folder).glob("*/*/*/cell.json"))]
        for folder in ("results", "alone")
    ]
    began = [run.pop("began") for folder in conditions for cell in folder for run in cell["runs"]]
    assert conditions[0] == conditions[1] and len(began) == 10


def test_a_sweep_ends_with_one_line_per_cell(command, tmp_path):
    code, out, _ = command(*GRID)
    assert code == 0
    lines = [line.split() for line in out.partition("KV bytes:")[0].splitlines()]
    # a cell's remark below the table, such as samples above its budget, has a colon behind its budget
    table = [tuple(line[:3]) for line in lines if len(line) > 6 and line[0] in ("full", "nacl", "snapkv")]
    table = [line for line in table if not line[1].endswith(":")]
    assert table == [
        (m, b, "6") for m, b in [("full", "1"), *[(m, b) for m in ("nacl", "snapkv") for b in ("0.5", "0.2")]]
    ]
    assert f"records: {tmp_path / 'results'}" in out
    assert "protocol=query_aware, dtype=float32, device=cpu" in out and "0 of 6 samples cut in the middle" in out


def test_a_table_of_a_sweep_is_whole_at_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("-m", "method=snapkv", "budget=0.5", "method.window=8,16")
    table = out[out.index("method ") : out.index("KV bytes:")]
    assert code == 0 and max(map(len, table.splitlines())) <= 80 and "…" not in table
    assert table.count(" to ") == 3 and "snapkv window=16" in table


def test_jobs_that_share_a_groups_samples_print_its_table_once(command):
    code, out, _ = command(*GRID, "hydra.sweeper.shards=2")
    assert code == 0 and out.count("95 % interval") == 1
    assert "job 2 of 2 for these samples is done" in out


def test_what_is_on_disk_is_not_run_again_and_needs_no_model(command, tmp_path, monkeypatch):
    command(*GRID)
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    sweep.loaded.cache_clear()
    monkeypatch.setattr(sweep, "load_model", lambda *a: pytest.fail("the model was loaded"))
    assert command(*GRID)[0] == 0
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")} == before


def test_a_single_run_finds_what_the_sweep_has_made_and_shows_no_speed_of_a_group(command, monkeypatch):
    command(*GRID)
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("the model was loaded"))
    code, out, _ = command("method=nacl", "budget=0.2")
    speeds = [line.split()[-2:] for line in out.splitlines() if line.strip().startswith(("prefill,", "decode,"))]
    assert code == 0 and speeds == [["-", "-"], ["-", "-"]]


def test_only_the_missing_members_of_a_sample_are_run(command, tmp_path):
    command("method=nacl", "budget=0.5", "task.limit=2")
    command("-m", "method=nacl", "budget=0.2", "task.limit=1")
    before = comparable(tmp_path / "results")
    assert command(*GRID)[0] == 0
    sizes = {cell: [row.get("group") for row in rows] for cell, rows in records(tmp_path / "results").items()}
    by_name = {cell.rpartition("-")[0]: sizes[cell] for cell in sizes}
    # four samples: two per subset of the single run; one of each was in the small sweep
    assert by_name["full-b1"] == [None] * 4 + [5] * 2 and by_name["nacl-b0.5"] == [None] * 4 + [5] * 2
    assert sorted(by_name["nacl-b0.2"]) == sorted([2, 2, 3, 3, 5, 5][2:] + [1, 1])
    assert sorted(by_name["snapkv-b0.2"]) == [2, 2, 3, 3, 5, 5]
    after = comparable(tmp_path / "results")
    assert all(after[cell][id] == row for cell, rows in before.items() for id, row in rows.items())


def test_a_method_that_changes_the_prompt_runs_alone_and_says_so(command, tmp_path):
    code, _, err = command("-m", "method=full,streaming_llm", "budget=0.5", "+method.prefill=streaming", "task.limit=1")
    assert code == 2 or "runs alone" in err
    alone = ("-m", "method=streaming_llm", "budget=0.5,0.3", "method.prefill=streaming", "task.limit=1")
    assert command(*alone, "plan=true")[1].count("alone: changes the prompt itself") == 2
    code, _, err = command(*alone)
    assert code == 0 and err.count("changes the prompt itself, it runs alone") == 2, err
    groups = {cell: {row.get("group") for row in rows} for cell, rows in records(tmp_path / "results").items()}
    assert {g for cell, own in groups.items() if cell.startswith("streaming") for g in own} == {None}


def test_texts_that_are_fed_share_their_prompts_too(command, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text * 12}) + "\n" for text in ("a river runs north. ", "It RAINS. ")))
    text = ("task=perplexity", f"task.data={texts}", "task.length=100", "task.stride=8", "task.limit=2")
    assert command(*GRID, *text)[0] == 0
    for method, budget in [("nacl", 0.5), ("snapkv", 0.2)]:
        assert command(f"method={method}", f"budget={budget}", *text, results=tmp_path / "alone")[0] == 0
    together, alone = records(tmp_path / "results"), records(tmp_path / "alone")
    assert len(together) == 5 and {row["group"] for rows in together.values() for row in rows} == {5}
    for cell, rows in alone.items():
        for ours, own in zip(together[cell], rows, strict=True):
            near(ours["score"], own["score"], losses_off())
            assert all(ours[key] == own[key] for key in ("id", "counted", "weights", "ledger", "tokens_context"))


def test_what_cannot_share_its_prompts_says_why(command, tmp_path):
    talk = (*talk_of(tmp_path), "task.history=own")
    why = "questions that go on from answers of their own"
    assert command(*GRID, *talk, "plan=true")[1].count(f"alone: {why}") == 5
    code, _, err = command(*GRID, *talk)
    assert code == 0 and f"5 cells run alone: {why}" in err


def talk_of(folder: Path) -> tuple[str, ...]:
    turns = [{"input": "where is the mat?", "answer": " here."}, {"input": "who sat?", "answer": " the cat."}]
    rows = [{"context": f"the cat sat on a {what}. " * 9, "multi_turns": turns, "max_new_tokens": 2} for what in "ab"]
    kept = folder / "kept.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "task=multiturn", f"task.data={kept}"


def items_of(folder: Path) -> tuple[str, ...]:
    (folder / "items").mkdir()
    return "task=lm_eval", f"task.data={write(folder / 'items')}", "task.tasks=[piqa,copa]"


@pytest.mark.parametrize(
    ("task", "batch"),
    [
        (talk_of, 2),
        (items_of, 1),
        pytest.param(talk_of, 1, marks=pytest.mark.slow),
        pytest.param(items_of, 2, marks=pytest.mark.slow),
    ],
)
def test_questions_and_choices_share_their_prompts_too(command, tmp_path, task, batch):
    words = (*task(tmp_path), f"batch_size={batch}")
    assert command(*GRID, *words)[0] == 0
    for method, budget in [("nacl", 0.5), ("snapkv", 0.2)]:
        assert command(f"method={method}", f"budget={budget}", *words, results=tmp_path / "alone")[0] == 0
    together, alone = comparable(tmp_path / "results"), comparable(tmp_path / "alone")
    assert len(together) == 5 and len(alone) == 3
    assert {row["group"] for rows in records(tmp_path / "results").values() for row in rows} == {5}
    for cell, rows in alone.items():
        assert len(rows) > 1
        for id, own in rows.items():
            ours = together[cell][id]
            near(ours.pop("likelihoods", []), own.pop("likelihoods", []), losses_off(32))
            assert ours == own


def test_a_sweep_in_batches_equals_single_runs_in_batches(command, tmp_path):
    assert command(*GRID, "batch_size=2", "chunk=64")[0] == 0
    for budget in (0.5, 0.2):
        command("method=snapkv", f"budget={budget}", "batch_size=2", "chunk=64", results=tmp_path / "alone")
    alone = comparable(tmp_path / "alone")
    together = comparable(tmp_path / "results")
    assert len(alone) == 3 and {cell: together[cell] for cell in alone} == alone


@pytest.mark.parametrize("setting", ["group.max_bytes=1", "group.max_cells=2"])
def test_a_group_is_split_to_its_bounds(command, tmp_path, setting):
    assert command(*GRID, results=tmp_path / "whole")[0] == 0
    assert command(*GRID, setting)[0] == 0
    sizes = {row["group"] for rows in records(tmp_path / "results").values() for row in rows}
    assert sizes == ({1} if "bytes" in setting else {1, 2})
    assert comparable(tmp_path / "results") == comparable(tmp_path / "whole")


def test_a_group_that_runs_out_of_memory_is_halved(command, tmp_path, monkeypatch):
    real = sweep.answer_together

    def short_of_memory(setting, methods, *args):
        if len(methods) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return real(setting, methods, *args)

    monkeypatch.setattr(sweep, "answer_together", short_of_memory)
    code, _, err = command(*GRID)
    assert code == 0 and "CUDA out of memory. Tried to allocate 2 GiB (" in err and "; trying groups of 2" in err
    assert err.count("trying groups") == 1  # what was learned holds for the samples that follow
    monkeypatch.undo()
    rows = records(tmp_path / "results")
    assert len(rows) == 5 and all(len(own) == 6 and not any("error" in r for r in own) for own in rows.values())


def test_a_sample_that_fails_twice_is_recorded_and_its_command_is_printed(command, tmp_path, monkeypatch):
    real, tries = EvictionCache.end_step, []

    failing = {zlib.crc32(id) for id in (b"mat/1", b"river/1")}

    def end_step(self, step):
        if self.method.name == "nacl" and self.method.budget == 0.2 and int(step.samples[0]) in failing:
            tries.append(1)
            raise RuntimeError("lost\nmore")
        real(self, step)

    monkeypatch.setattr(EvictionCache, "end_step", end_step)
    code, _, err = command(*GRID)
    assert code == 1 and "failed: nacl at budget=0.2: 2 of 6 samples: " in err and "(RuntimeError: lost (" in err
    assert "Error executing job" not in err  # Hydra's own word, with the overrides of every cell
    assert len(tries) == 4  # in the group and once more alone
    (again,) = [line.strip() for line in err.splitlines() if line.strip().startswith("python run.py")]
    assert again.endswith("method=nacl budget=0.2")
    monkeypatch.setattr(EvictionCache, "end_step", real)
    assert command(*again.split()[5:])[0] == 0
    (rows,) = [own for cell, own in records(tmp_path / "results").items() if cell.startswith("nacl-b0.2")]
    assert len(rows) == 8 and sum("error" in row for row in rows) == 2


def test_the_command_of_what_failed_can_be_given_to_a_shell(command, tmp_path):
    folder = f"'{tmp_path / 'a & b; [c]'}'"  # quoted for Hydra
    code, _, err = command("-m", "method=nacl", "budget=0.2", "time_limit=0.000001", "task.limit=1", results=folder)
    (*_, again) = [line.strip() for line in err.splitlines() if line.strip().startswith("python run.py")]
    assert code == 1 and f"results={folder}" in shlex.split(again) and shlex.split(again)[-1] == "budget=0.2"


def test_nan_is_a_failure_of_its_member_only(command, tmp_path, monkeypatch):
    real = EvictionCache.attend

    def attend(self, step):
        out = real(self, step)
        return out * torch.nan if self.method.name == "snapkv" and step.q.shape[2] == 1 else out

    monkeypatch.setattr(EvictionCache, "attend", attend)
    code, _, err = command(*GRID, "task.limit=1")
    assert code == 1 and "the logits hold a NaN" in err
    rows = records(tmp_path / "results")
    assert all(("error" in row) == cell.startswith("snapkv") for cell, own in rows.items() for row in own)


def test_a_sample_over_the_time_limit_is_recorded(command, tmp_path):
    code, _, err = command(*GRID, "task.limit=1", "time_limit=0.000001")
    assert code == 1 and "TimeLimit" in err
    assert all("error" in row for own in records(tmp_path / "results").values() for row in own)
    assert command(*GRID, "task.limit=1")[0] == 0


def test_the_time_limit_holds_for_cells_that_run_alone(command):
    alone = ("-m", "method=streaming_llm", "budget=0.5", "method.prefill=streaming")
    for words in [("method=snapkv",), alone]:
        code, _, err = command(*words, "task.limit=1", "time_limit=0.000001")
        assert code == 1 and "TimeLimit: was not done within time_limit=1e-06 seconds" in err, words
        assert command(*words, "task.limit=1", "time_limit=1000")[0] == 0


def test_a_missed_budget_ends_its_cell_and_no_other(command, tmp_path, monkeypatch):
    def miss(self, name):
        if name == "nacl" and self.share < 0.4:
            raise BudgetMiss("nacl", asked=1000, measured=4096, full=8192)

    monkeypatch.setattr(Report, "check_budget", miss)
    code, _, err = command(*GRID, "budget_miss=fail")
    assert code == 1 and "nacl at budget=0.2" in err and "4,096 bytes" in err
    sizes = {cell.rpartition("-")[0]: len(own) for cell, own in records(tmp_path / "results").items()}
    assert sizes == {"full-b1": 6, "nacl-b0.5": 6, "nacl-b0.2": 1, "snapkv-b0.5": 6, "snapkv-b0.2": 6}


def test_a_cell_that_cannot_work_is_said_and_the_others_run(command, tmp_path):
    code, _, err = command("-m", "method=snapkv", "method.kernel=4,5", "budget=0.5,1.5", "task.limit=1")
    assert code == 2 and "budget=1.5: a share lies in (0, 1]" in err and "kernel" in err and "Traceback" not in err
    assert [cell.rpartition("-")[0] for cell in records(tmp_path / "results")] == ["full-b1", "snapkv-b0.5"]


def test_a_method_that_must_not_know_the_question_is_left_out_of_a_sweep_and_refused_alone(
    command, monkeypatch, tmp_path
):
    given = []
    monkeypatch.setattr(SnapKV, "needs_split", True)
    monkeypatch.setattr(SnapKV, "needs", frozenset({"ids", "spans", "vocabulary"}))
    monkeypatch.setattr(
        SnapKV, "observe", lambda self, store, step, mass: given.append((step.ids, step.span("context")))
    )
    code, _, err = command("-m", "method=snapkv,h2o", "budget=0.5", "task.limit=1")
    assert code == 0 and not given
    assert "left out: method=snapkv budget=0.5: method=snapkv: compresses a text before it knows the question" in err
    assert "give protocol=query_agnostic" in err
    assert [cell.rpartition("-")[0] for cell in records(tmp_path / "results")] == ["full-b1", "h2o-b0.5"]
    code, _, err = command("method=snapkv", "budget=0.5", "task.limit=1")
    assert code == 2 and "protocol=query_agnostic" in err and len(err.splitlines()) == 1
    # where it may run, it is told what it needs to know, alone and in a group
    for words in (["budget=0.5"], ["-m", "budget=0.25"]):
        code, _, err = command(*words, "method=snapkv", "task.limit=1", "protocol=query_agnostic")
        assert code == 0, err
        ids, context = max(given, key=lambda one: one[0].shape[1])  # what is compressed; a question is shorter
        assert context[0, 1] == ids.shape[1] and context[0, 0] < context[0, 1]
        given.clear()


@pytest.mark.parametrize("plan", ["false", "true"])
def test_a_sweep_of_which_no_cell_can_work_says_each_in_a_line_and_ends(command, tmp_path, plan):
    code, _, err = command("-m", "method=snapkv", "method.kernell=3", "budget=0.5,0.25", f"plan={plan}")
    assert code == 2 and "kernell" in err and "Traceback" not in err
    assert not (tmp_path / "results" / "reference").exists()
    code, _, err = command("cells=[]")
    assert code == 2 and err == "error: cells=[]: give at least one cell, such as cells=['method=nacl budget=0.5']\n"
    code, _, err = command("cells=[1]", f"plan={plan}")
    assert code == 2 and err.startswith("error: 1") and len(err.splitlines()) == 1


def test_a_record_made_under_other_conditions_stops_its_cell_only(command, tmp_path):
    command(*GRID, "task.limit=1")
    (path,) = (tmp_path / "results").glob("*/*/nacl-b0.2*/cell.json")
    cell = json.loads(path.read_text())
    cell["runs"][0]["conditions"]["torch"] = "1.0"
    path.write_text(json.dumps(cell))
    code, _, err = command(*GRID, "task.limit=2")
    assert code == 2 and "torch was 1.0" in err
    assert sorted(len(own) for own in records(tmp_path / "results").values()) == [2, 4, 4, 4, 4]


def test_a_damaged_record_stops_its_cell_only(command, tmp_path):
    command(*GRID, "task.limit=1")
    (path,) = (tmp_path / "results").glob("*/*/nacl-b0.2*/samples.jsonl")
    whole = path.read_bytes()
    path.write_bytes(b"oops\n" + whole)
    code, out, err = command(*GRID)
    assert code == 2 and err.count(f"failed: nacl at budget=0.2: {path}, line 1: not a sample's record") == 1
    assert "records: " in out and path.read_bytes() == b"oops\n" + whole
    path.unlink()
    assert sorted(len(own) for own in records(tmp_path / "results").values()) == [6] * 4


def test_the_plan_says_cells_groups_bytes_and_time_and_runs_nothing(command, tmp_path, monkeypatch):
    command("-m", "method=nacl", "budget=0.5", "task.limit=1")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    monkeypatch.setattr(sweep, "load_model", lambda *a: pytest.fail("the model was loaded"))
    sweep.loaded.cache_clear()
    code, out, _ = command(*GRID, "plan=true")
    assert code == 0 and "6 prompts of " in out and "read once for 5 cells" in out and "time: about" in out
    assert re.search(r"^ *method +budget +done +to run +KV bytes of the longest +runs *$", out, re.M)
    lines = [line.split() for line in out.splitlines()]
    table = {(line[0], line[1]): (line[2], line[3]) for line in lines if len(line) > 6 and line[0] in method_names()}
    assert table[("nacl", "0.5")] == ("2", "4") and table[("snapkv", "0.2")] == ("0", "6")
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")} == before
    code, out, _ = command("method=nacl", "budget=0.5", "task.limit=1", "plan=true")
    assert code == 0 and "everything is on disk" in out
    code, out, _ = command(*GRID, "plan=true", "hydra.sweeper.shards=3")
    assert code == 0 and out.count("read once for 5 cells") == 1


@pytest.mark.slow
def test_globs_ranges_and_each_methods_own_points_are_cells(command):
    code, out, _ = command("-m", "method=glob(s*)", "budget=range(0.1,0.4,0.1)", "plan=true", "task.limit=1")
    assert code == 0 and "0.3" in out and "0.30000000000000004" not in out
    cells_of = {line.split()[0] for line in out.splitlines() if len(line.split()) > 6}
    assert {"snapkv", "streaming_llm"} <= cells_of and "nacl" not in cells_of
    code, out, _ = command("-m", "method=full,snapkv", "budget=sweep", "plan=true", "task.limit=1")
    points = [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["snapkv"]]
    assert code == 0 and points == ["0.05", "0.1", "0.25", "0.5", "0.75"]


@pytest.mark.slow
def test_a_knob_of_one_value_is_for_all_methods_of_a_sweep(command):
    for words in [("-m", "method=kivi,per_token"), ("experiment=core-bits",)]:
        code, out, err = command(*words, "method.bits=4", "task=longbench", "plan=true", "task.limit=1")
        assert code == 0 and "kivi bits=4" in out and "per_token bits=4" in out and "bits=2" not in out, err
    code, _, err = command("-m", "method=kivi,nacl", "method.bits=4", "plan=true", "task.limit=1")
    assert code == 2 and "method.bits: no such setting" in err


def test_knobs_that_all_methods_take_stand_in_no_yaml_and_are_said_as_typed(command, tmp_path):
    words = ("-m", "method=snapkv,random,kivi", "method.pin=none,boundary", "budget=0.5", "task.limit=1")
    code, out, err = command(*words)
    assert code == 0, err
    assert all(f"{name} pin={pin}" in out for name in ("snapkv", "random") for pin in ("none", "boundary"))
    assert "left out: method=kivi method.pin=none budget=0.5: method.pin=none: Codec ranks no slots" in err
    cells = [json.loads((path / "cell.json").read_text()) for path in (tmp_path / "results").glob("*/*/snapkv-*")]
    assert sorted(cell["identity"]["method"]["config"]["pin"] for cell in cells) == ["boundary", "none"]
    assert all("method.pin=" in cell["runs"][0]["command"] and "++" not in cell["runs"][0]["command"] for cell in cells)


def test_a_budget_that_no_prompt_can_meet_is_left_out_of_a_sweep_and_ends_a_single_command(command):
    code, out, err = command("-m", "method=snapkv,random", "budget=8", "dry_run=true", "task.limit=1")
    assert code == 0 and "random" in out and "snapkv" not in out
    assert "left out: method=snapkv budget=8: SnapKV: budget=8 slots do not hold method.window=32" in err
    code, _, err = command("method=snapkv", "budget=8", "dry_run=true", "task.limit=1")
    assert code == 2 and "SnapKV: budget=8 slots do not hold" in err


def test_a_sweep_composes_each_method_once(command, monkeypatch):
    composed, real = [], ConfigLoaderImpl._load_configuration_impl

    def load(self, config_name, overrides, *args, **kwargs):
        composed.append([word for word in overrides if word.startswith("method=")])
        return real(self, config_name, overrides, *args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", load)
    words = ("-m", "method=adakv,snapkv", "budget=0.5,0.2", "seed=0,1", "method.window=8,16", "dry_run=true")
    assert "17 cells" in command(*words)[1]
    # beside the methods: the whole command, whose mode it is, and its only job
    assert composed == [["method=adakv,snapkv"], ["method=adakv"], ["method=snapkv"], []]


GRIDS = [path.stem for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]


@pytest.mark.parametrize("grid", [x if x == "core" else pytest.param(x, marks=pytest.mark.slow) for x in GRIDS])
def test_every_named_grid_composes(command, grid):
    code, out, err = command(f"experiment={grid}", "plan=true", "task=longbench")
    assert code == 0 and "cells" in out, err


def test_another_task_is_a_group_of_its_own_and_the_model_is_loaded_once(command, tmp_path, monkeypatch, split):
    loads = []
    real = sweep.load_model
    monkeypatch.setattr(sweep, "load_model", lambda *a: loads.append(1) or real(*a))
    code, out, _ = command("-m", "method=full,snapkv", "task.subset=[river],[mat]", "task.limit=1")
    assert code == 0 and out.count("records: ") == 2 and len(loads) == 1


def test_a_method_that_changes_the_prompt_and_not_the_model_runs_on_the_same_one(command, monkeypatch):
    loads = []
    monkeypatch.setattr(sweep, "load_model", lambda *a: loads.append(a) or load_model(*a))
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("a second model was loaded"))
    code, out, err = command(
        "-m", "method=lococo,snapkv", "budget=128,256", "model.path=assets/reference", "task.limit=1"
    )
    assert code == 0 and len(loads) == 1, err
    assert err.count("changes the prompt itself, it runs alone") + out.count("it runs alone") == 2


def test_a_method_that_edits_the_model_has_one_of_its_own(command, monkeypatch):
    def halve(self, model):
        model.lm_head.weight.data *= 0.5
        model.lm_head.weight.add_(0.0)  # written to in a way that PyTorch counts

    monkeypatch.setattr(Random, "prepare", torch.no_grad()(halve))
    monkeypatch.setattr(Random, "edits_model", True)
    loads = []
    monkeypatch.setattr(sweep, "load_model", lambda *a: loads.append(a) or load_model(*a))
    code, out, err = command("-m", "method=random,snapkv", "budget=0.5", "task.limit=1")
    assert code == 0 and len(loads) == 2, err
    assert "edits the model, it runs alone" in out + err
    assert len({id(model) for model in map(sweep.loaded, *zip(*loads[:1], strict=True))}) == 1
    monkeypatch.setattr(Random, "edits_model", False)
    code, out, err = command("-m", "method=random", "budget=0.4", "task.limit=1")
    assert code == 2 and "its prepare changed the model" in out + err


def test_old_words_of_the_command_line_mean_what_they_meant(command, tmp_path):
    code, out, _ = command("method=nacl", "protocol=agnostic", "plan=true", "task.limit=1")
    assert code == 0 and "to run" in out and not list(tmp_path.glob("results/**/samples.jsonl"))
    for word in ("agnostic", "query_agnostic"):
        code, out, _ = command("method=nacl", f"protocol={word}", "task.limit=1")
        assert code == 0 and "protocol=query_agnostic, dtype" in out
    cells = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    assert len(cells) == 2 and {cell["identity"]["protocol"] for cell in cells} == {"agnostic"}


def test_the_plan_counts_the_bits_of_codes(command):
    code, out, _ = command("-m", "method=kivi", "method.bits=4,2", "method.store.residual=32", "plan=true")
    sizes = [float(line.split()[-5]) for line in out.splitlines() if line.strip().startswith("kivi")]
    assert code == 0 and len(sizes) == 2 and 22 > sizes[0] > sizes[1], out


def test_progress_says_which_group_it_is_what_failed_and_how_long_all_will_take(command, monkeypatch):
    real = EvictionCache.end_step

    def end_step(self, step):
        if self.method.name == "snapkv" and int(step.samples[0]) == zlib.crc32(b"mat/0"):
            raise RuntimeError("lost")
        real(self, step)

    monkeypatch.setattr(EvictionCache, "end_step", end_step)
    code, _, err = command("-m", "method=full,snapkv", "task.subset=[river],[mat]", "task.limit=1")
    lines = [line for line in err.splitlines() if "samples" in line and "left" in line]
    assert code == 1 and len(lines) == 2
    assert lines[0].startswith("group 1 of 2, 2 cells: 1/1 samples") and "failed" not in lines[0]
    assert lines[1].startswith("group 2 of 2, 2 cells: 1/1 samples") and "1 failed, all groups about 0 s" in lines[1]
    _, _, err = command("-m", "method=full,nacl", "task.subset=[river]", "task.limit=1")
    assert "group" not in next(line for line in err.splitlines() if "samples" in line)


def test_ctrl_c_keeps_what_is_done(command, tmp_path, monkeypatch):
    real, calls = sweep.answer_together, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sweep, "answer_together", interrupted)
    code, _, err = command(*GRID)
    assert code == 130 and "stopped; 10 samples of 5 cells are kept" in err and "Traceback" not in err
    monkeypatch.setattr(sweep, "answer_together", real)
    assert command(*GRID)[0] == 0
    assert all(len(own) == 6 for own in records(tmp_path / "results").values())


def start(tiny_model_dir, split, results, *overrides, room: int | None = None) -> int:
    """The sweep in a process of its own, which needs no imports any more; its process id.

    room: bytes that a file of its may have; what it says stands in `said` beside the results.
    """
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = (results.parent / "said").open("w", buffering=1)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        settings = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={results}"]
        sys.argv = ["run.py", *GRID, *settings, *overrides]
        os._exit(run.main())
    finally:
        os._exit(99)


def end(child: int) -> int:
    """The exit code of a process, which is ended if it takes longer than anything here may."""
    until = time.monotonic() + PATIENCE
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"process {child} did not end within {PATIENCE} seconds")
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(found[1])


def lines(results: Path) -> dict[str, list[dict]]:
    """Every file of records line by line, without times and without who shared a pass."""
    return {cell: [timeless(row) for row in rows] for cell, rows in records(results).items()}


def cell_files(results: Path) -> dict[str, str]:
    """The cell.json of every record, but for the second at which it was begun and for the results folder's name."""
    texts = {path.parent.name: path.read_text() for path in results.glob("*/*/*/cell.json")}
    return {name: re.sub(r'"began": "[^"]+"', "", text).replace(str(results), "") for name, text in texts.items()}


def test_two_processes_share_a_sweep_without_duplicates(command, tmp_path, tiny_model_dir):
    split = write_split(tmp_path / "long", samples=10, new_tokens=16)
    assert command(*GRID, f"task.data={split}", results=tmp_path / "undisturbed")[0] == 0
    children = [start(tiny_model_dir, split, tmp_path / "shared") for _ in range(2)]
    assert [end(child) for child in children] == [0, 0]
    assert comparable(tmp_path / "shared") == comparable(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_full_disk_stops_a_sweep_with_a_clear_error_and_loses_nothing(command, tmp_path, tiny_model_dir):
    split = write_split(tmp_path / "long", samples=10)
    assert command(*GRID, f"task.data={split}", results=tmp_path / "undisturbed")[0] == 0
    whole = [path.stat().st_size for path in (tmp_path / "undisturbed").glob("*/*/*/samples.jsonl")]
    results = tmp_path / "results"
    assert end(start(tiny_model_dir, split, results, room=min(whole) * 2 // 3)) == 2
    said = (tmp_path / "said").read_text()
    assert "cannot write on (File too large); finished samples are kept" in said and "Traceback" not in said, said
    kept = lines(results)
    assert kept and all(0 < len(rows) < 20 for rows in kept.values())
    assert all(path.read_bytes().endswith(b"\n") for path in results.glob("*/*/*/samples.jsonl"))
    assert end(start(tiny_model_dir, split, results)) == 0
    assert lines(results) == lines(tmp_path / "undisturbed")
    assert all(rows[: len(kept[cell])] == kept[cell] for cell, rows in lines(results).items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_twenty_times_ends_as_if_undisturbed(command, tmp_path, tiny_model_dir):
    split = write_split(tmp_path / "long", samples=20, new_tokens=16)
    assert command(*GRID, f"task.data={split}", results=tmp_path / "undisturbed")[0] == 0
    chance, results = random.Random(0), tmp_path / "killed"

    def files() -> list[Path]:
        return sorted(results.glob("*/*/*/samples.jsonl"))

    def written() -> int:
        return sum(path.stat().st_size for path in files())

    for kill in range(20):
        before, child = written(), start(tiny_model_dir, split, results)
        if kill % 4 == 3:  # while it composes, reads records, loads the model
            time.sleep(chance.random())
        else:  # once it has begun to write
            until = time.monotonic() + PATIENCE
            while written() <= before and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        assert end(child) == -signal.SIGKILL, "the sweep was done before it had been killed often enough"
        if kill % 5 == 4:  # and in the middle of a line
            torn = chance.choice([path for path in files() if path.stat().st_size])
            os.truncate(torn, torn.stat().st_size - 1 - chance.randrange(200))
    assert end(start(tiny_model_dir, split, results)) == 0
    assert lines(results) == lines(tmp_path / "undisturbed")
    assert cell_files(results) == cell_files(tmp_path / "undisturbed")
    names = {path.name for path in results.rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(".")} == {"samples.jsonl", "cell.json", "multirun.yaml"}
