"""The command line from end to end, on a tiny random model and a small split of its own."""

import errno
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import run
from runners import evaluate, model_setup, sweep
from runners.engine import answer
from runners.records import provenance as revision
from runners.records import record
from tests.rows import timeless

ROOT = Path(run.__file__).parent
TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. "


def write_split(folder: Path, samples: int = 3, new_tokens: int = 4) -> Path:
    """Two subsets of one category each, with prompts of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    prompt = "Read. {context}\nQuestion: {input}\nAnswer:"
    subsets = {
        "river": {"category": "single-doc QA", "metric": "f1", "prompt": prompt, "max_new_tokens": new_tokens},
        "mat": {"category": "synthetic", "metric": "f1", "prompt": prompt, "max_new_tokens": new_tokens},
    }
    (folder / "subsets.yaml").write_text(yaml.safe_dump(subsets))
    for name in subsets:
        write_rows(folder / f"{name}.jsonl", [row(name, i) for i in range(samples)])
    return folder


def row(name: str, i: int) -> dict:
    return {
        "input": f"where is the {name} {i}?", "context": TEXT * (2 + i % 2), "answers": ["the north"], "length": 40,
        "dataset": name, "language": "en", "all_classes": None, "_id": f"{name}-{i}",
    }  # fmt: skip


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


@pytest.fixture
def split(tmp_path) -> Path:
    return write_split(tmp_path / "split")


@pytest.fixture
def command(tmp_path, tiny_model_dir, split, run_command):
    """The command line on the tiny model and the split: command("budget=0.5", ...) -> (exit code, stdout, stderr)."""

    def run_it(*overrides: str, results: Path | str = tmp_path / "results") -> tuple[int, str, str]:
        flags = [word for word in overrides if word.startswith("--")]  # Hydra wants them first
        given = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={results}"]
        return run_command(*flags, *given, *(word for word in overrides if word not in flags))

    return run_it


def samples(results: Path, method: str = "nacl") -> dict[str, dict]:
    """The record of the only cell of a method, by sample; fails if a sample is there twice."""
    (path,) = results.glob(f"*/*/{method}-b*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["id"] for r in rows}) == len(rows)
    return {r["id"]: r for r in rows}


def without_times(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows without what depends on who shared a pass."""
    return {id: timeless(row) for id, row in rows.items()}


def test_a_run_prints_its_source_first_and_ends_with_the_table_and_the_record(command, tmp_path):
    code, out, err = command()
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("longbench-custom") and "6 samples" in lines[0]
    assert "river" in out and "single-doc QA" in out and "average" in out
    assert "KV bytes, end of prompt" in out and "prefill, tokens/s" in out and "decode, ms/token" in out
    assert "0 of 6 samples cut" in out
    assert lines[-1].startswith(f"record: {tmp_path / 'results'}")
    assert "Traceback" not in err


def test_every_sample_has_its_line_with_prediction_score_tokens_ledger_and_times(command, tmp_path):
    command()
    rows = samples(tmp_path / "results")
    assert set(rows) == {f"{name}/{i}" for name in ("river", "mat") for i in range(3)}
    for one in rows.values():
        assert isinstance(one["prediction"], str) and 0 <= one["score"] <= 1
        assert one["tokens_in"] > one["tokens_context"] > 0 and 1 <= one["tokens_out"] <= 4
        assert 0 < one["ledger"]["held_prompt"] < one["ledger"]["full_prompt"]
        assert one["timings"]["prompt"] > 0 and one["timings"]["n_prompt"] == one["tokens_in"]


@pytest.mark.parametrize("words", [("method=kivi", "method.bits=4"), ("method=adakv", "budget=0.4")])
def test_a_samples_bytes_do_not_depend_on_the_batch(command, tmp_path, words):
    own = ("held_prompt", "held_end", "full_prompt", "full", "mean_decode", "share", "asked", "overhead")
    found, shown = [], []
    for batch in (1, 3):
        _, out, _ = command(*words, f"batch_size={batch}", results=tmp_path / str(batch))
        rows = samples(tmp_path / str(batch), words[0].removeprefix("method="))
        assert {one["batch"] for one in rows.values()} == {batch}
        found.append({id: [one["ledger"][name] for name in own] for id, one in rows.items()})
        shown.append([line for line in out.splitlines() if "KV bytes" in line])
    assert found[0] == found[1] and shown[0] == shown[1] and len(shown[0]) == 2


def test_the_full_cache_holds_everything_and_has_its_own_record(command, tmp_path):
    command()
    full, ours = samples(tmp_path / "results", "full"), samples(tmp_path / "results")
    assert set(full) == set(ours)
    for id, one in full.items():
        assert one["ledger"]["share"] >= 1 > ours[id]["ledger"]["share"]
    cell = json.loads(next((tmp_path / "results").glob("*/*/nacl-b0.5-*/cell.json")).read_text())
    assert cell["identity"]["method"]["config"]["budget"] == 0.5 and cell["identity"]["protocol"] == "aware"


def test_what_is_on_disk_is_not_computed_again_and_needs_no_model(command, tmp_path, monkeypatch):
    _, first, _ = command()
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("the model was loaded"))
    code, second, _ = command()
    assert code == 0 and second == first
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")} == before


def test_a_larger_limit_goes_on_in_the_same_record(command, tmp_path):
    command("task.limit=1")
    (path,) = (tmp_path / "results").glob("*/*/nacl-b*/samples.jsonl")
    first = path.read_text()
    assert len(first.splitlines()) == 2
    code, _, err = command()
    assert code == 0 and "2 of 6 samples are on disk" in err
    assert path.read_text().startswith(first) and len(samples(tmp_path / "results")) == 6


def test_a_sample_is_the_same_sample_whatever_is_chosen_beside_it(command, tmp_path, split):
    assert command("task.subset=river", "task.limit=2")[0] == 0
    results = tmp_path / "results"
    first = samples(results)
    code, out, _ = command("task.limit=1")
    assert code == 0 and len(list(results.glob("*/*/nacl-*"))) == 1
    assert {id: row for id, row in samples(results).items() if id in first} == first  # none was computed again
    assert set(samples(results)) == {"river/0", "river/1", "mat/0"}
    assert "0 of 2 samples cut" in out  # the table is of the two that were asked for
    write_rows(split / "river.jsonl", [row("river", 0) | {"input": "who?"}, row("river", 1)])
    code, _, err = command("task.subset=river", "task.limit=2")
    (path,) = results.glob("*/*/nacl-*/samples.jsonl")
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and [one["id"] for one in again].count("river/0") == 2 and len(again) == 4, err


@pytest.mark.slow
def test_two_folders_of_data_have_records_of_their_own(command, tmp_path):
    other = write_split(tmp_path / "other", samples=1)
    command("method=full", "task.limit=1")
    command("method=full", "task.limit=1", f"task.data={other}")
    books = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    assert sorted(book["identity"]["task"]["data"] for book in books) == ["other", "split"]
    assert all("data_sha256" in book["runs"][0]["samples"] for book in books)


def test_finished_records_that_cannot_be_written_are_shown_and_unfinished_ones_refused(command, tmp_path, monkeypatch):
    command("task.limit=1")
    (lost,) = (tmp_path / "results").glob("*/*/nacl-*/cell.json")
    whole = lost.read_text()

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(record.tempfile, "TemporaryFile", read_only)
        patch.setattr(record, "_replace", read_only)
        patch.setattr("filelock.FileLock.acquire", read_only)
        for words in ((), ("-m", "budget=0.5")):
            code, out, err = command(*words, "task.limit=1")
            assert code == 0 and "KV bytes" in out and "Traceback" not in err, err
        code, _, err = command("task.limit=2")
        assert code == 2 and "cannot be written (Read-only file system)" in err and len(err.splitlines()) == 1
        code, _, err = command("-m", "budget=0.5,0.4", "task.limit=1")
        assert code == 2 and "cannot be written (Read-only file system)" in err
    lost.write_text("")
    code, _, err = command("task.limit=1")
    again, before = json.loads(lost.read_text()), json.loads(whole)
    assert code == 0 and "is written again" in err and again["identity"] == before["identity"]
    assert again["runs"][0]["conditions"] == before["runs"][0]["conditions"]


def test_results_that_are_deleted_during_a_run_are_no_success(command, tmp_path, monkeypatch):
    draw = evaluate.Evaluate._report
    monkeypatch.setattr(evaluate.Evaluate, "_report", lambda self, run: shutil.rmtree(run.results) or draw(self, run))
    code, _, err = command("task.limit=1")
    assert code == 1 and "2 of 2 samples with nacl are not in" in err and "were deleted" in err


def test_a_second_method_uses_the_full_cache_record_that_is_there(command, tmp_path):
    command("task.limit=1")
    (path,) = (tmp_path / "results").glob("*/*/full-b*/samples.jsonl")
    before = path.read_bytes()
    assert command("method=snapkv", "budget=0.25", "method.window=8", "task.limit=1")[0] == 0
    assert path.read_bytes() == before


def test_the_protocol_the_seed_and_the_budget_have_records_of_their_own(command, tmp_path):
    for overrides in ((), ("protocol=agnostic",), ("seed=1",), ("budget=0.25",), ("budget=32",)):
        assert command("task.limit=1", *overrides)[0] == 0
    assert len(list((tmp_path / "results").glob("*/*/nacl-b*"))) == 5
    # the full cache depends on the protocol alone
    assert len(list((tmp_path / "results").glob("*/*/full-b*"))) == 2


def test_the_agnostic_protocol_compresses_the_context_only(command, tmp_path):
    command("protocol=agnostic", "task.limit=1")
    for one in samples(tmp_path / "results").values():
        assert one["timings"]["n_prompt"] == one["tokens_context"] < one["tokens_in"]
        assert one["timings"]["question"] > 0


def test_the_full_cache_alone_is_a_run_too(command, tmp_path):
    code, out, _ = command("method=full", "budget=0.1")
    assert code == 0 and "difference" not in out
    assert [path.name[:7] for path in (tmp_path / "results").glob("*/*/*")] == ["full-b1"]


def test_batches_and_chunks_give_the_same_predictions_in_a_record_of_their_own(command, tmp_path):
    command("method=full")
    before = samples(tmp_path / "results", "full")
    _, out, _ = command("method=full", "batch_size=4", "chunk=50")
    assert "threads=1, batch_size=4, chunk=50; 0 of 6" in out
    path = Path(out.splitlines()[-1].removeprefix("record: ")) / "samples.jsonl"
    other = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    assert {id: r["prediction"] for id, r in before.items()} == {id: r["prediction"] for id, r in other.items()}
    assert {r["batch"] for r in other.values()} == {4, 2}


def test_the_record_names_the_form_of_the_kernels_that_ran(command, tmp_path):
    command("method=full", "task.limit=1", "kernels.backend=reference")
    cell = json.loads(next((tmp_path / "results").glob("*/*/full-*/cell.json")).read_text())
    assert cell["runs"][0]["conditions"]["backend"] == "reference"


def test_triton_without_a_gpu_is_refused_in_one_line(command, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = command("kernels.backend=triton", "device=cpu")
    assert code == 2 and len(err.splitlines()) == 1
    assert "kernels.backend=triton: " in err and "kernels.backend=reference works everywhere" in err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("budget=0", "budget=0: a share lies in (0, 1]"),
        ("budget=-1", "budget=-1: a share lies in (0, 1]"),
        ("budget=1.5", "budget=1.5: a share lies in (0, 1]"),
        ("budget=2.7", "budget=2.7: a share lies in (0, 1]"),
        ("budget=half", "budget=half: give a share"),
        ("budgett=0.5", "budgett: no such setting; did you mean budget?"),
        ("budget=0.1,0.2", "budget=0.1,0.2: several values need -m"),
        ("method=snapkw", "method=snapkw: unknown; did you mean snapkv?"),
        ("task=longbank", "task=longbank: unknown; did you mean longbench?"),
        ("model=llama", "model=llama: unknown;"),
        ("runner=nothing", "runner=nothing: unknown; runner is one of calibrate"),
        ("task.limitt=1", "task.limitt: no such setting; did you mean task.limit?"),
        ("task.limit=-1", "task.limit=-1; give a whole number"),
        ("method.window=3", "method.window: no such setting; method has budget"),
        ("protocol=blind", "protocol=blind: give query_aware or query_agnostic"),
        ("dtype=int8", "dtype=int8: give one of auto"),
        ("device=tpu", "device=tpu: give auto"),
        ("kernels.backend=cuda", "kernels.backend=cuda: give one of auto, reference, triton"),
        ("batch_size=0", "batch_size=0: give a whole number, 1 or more"),
        ("threads=0", "threads=0: give a whole number, 1 or more"),
        ("chunk=half", "chunk=half: give a whole number"),
        ("~method", "method: nothing is chosen"),
    ],
)
def test_a_value_that_cannot_work_exits_with_2_and_one_line(command, override, says):
    code, _, err = command(override)
    assert code == 2
    assert says in err and len(err.splitlines()) == 1, err


def test_an_unknown_name_lists_the_right_ones(command):
    _, _, err = command("method=zzz")
    assert all(name in err for name in ("full", "nacl", "random", "snapkv", "streaming_llm"))
    _, _, err = command("model=zzz")
    assert "llama3.1-8b" in err and "reference" in err


def test_hydra_full_error_shows_the_traceback(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = command("budget=0")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: budget=0")


def test_a_wrong_value_is_refused_before_torch_is_imported():
    probe = (
        "import sys, run; sys.argv = ['run.py', 'budget=7.5']; code = run.main();"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr


def test_missing_and_empty_data_say_where_they_were_looked_for(command, tmp_path):
    code, _, err = command(f"task.data={tmp_path / 'nowhere'}")
    assert code == 2 and str(tmp_path / "nowhere") in err and len(err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    code, _, err = command(f"task.data={tmp_path / 'empty'}")
    assert code == 2 and "no .jsonl file" in err and len(err.splitlines()) == 1


def test_a_line_that_is_not_json_is_named_by_file_and_line(command, split):
    write_rows(split / "mat.jsonl", [row("mat", 0), "{not json"])
    code, _, err = command()
    assert code == 2 and f"{split / 'mat.jsonl'}, line 2: not JSON" in err


def test_bad_rows_are_recorded_and_the_rest_goes_on(command, split, tmp_path):
    rows = [row("mat", 0), row("mat", 1) | {"context": "  "}, row("mat", 2)]
    del rows[2]["answers"]
    write_rows(split / "mat.jsonl", rows)
    code, out, err = command()
    assert code == 1
    assert "2 of 6 samples with nacl" in err and "mat/1 (`context` is empty" in err and "mat/2 (`answers`" in err
    found = samples(tmp_path / "results")
    assert [id for id, r in found.items() if "error" in r] == ["mat/1", "mat/2"]
    assert "average" in out
    assert command()[0] == 1
    assert samples(tmp_path / "results") == found  # and they are not written down a second time


def test_a_context_longer_than_the_window_is_cut_and_counted(command, split, tmp_path):
    write_rows(split / "mat.jsonl", [row("mat", 0) | {"context": TEXT * 100}, row("mat", 1)])
    code, out, _ = command()
    assert code == 0 and "1 of 5 samples cut in the middle" in out
    found = samples(tmp_path / "results")
    assert found["mat/0"]["cut"] and not found["mat/1"]["cut"]
    assert 1200 < found["mat/0"]["tokens_in"] <= 2048 - 500 + 4


def test_a_question_without_room_is_cut_as_the_benchmark_cuts_it_also_in_the_first_sample(command, split, tmp_path):
    write_rows(split / "river.jsonl", [row("river", 0) | {"input": TEXT * 100}, row("river", 1)])
    code, out, err = command()
    assert code == 0 and "1 of 5 samples cut in the middle" in out, err
    found = samples(tmp_path / "results")
    assert found["river/0"]["cut"] and 1200 < found["river/0"]["tokens_in"] <= 2048 - 500 + 4


def test_a_file_in_the_way_of_the_results_is_said_before_anything_runs(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("the model was loaded"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = command(results=folder)
        assert code == 2 and f"results={folder}: cannot be written" in err and len(err.splitlines()) == 1
    code, _, err = command("-m", "budget=0.5,0.25", results=tmp_path / "file")
    assert code == 2 and "cannot be written" in err and "Traceback" not in err


def test_results_that_cannot_be_written_are_named_by_a_sweep_too(command, tmp_path, monkeypatch):
    def read_only(cfg, path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(OmegaConf, "save", read_only)
    code, _, err = command("-m", "budget=0.5,0.25")
    assert code == 2 and err == f"error: results={tmp_path / 'results'}: cannot be written (Read-only file system)\n"


def test_a_disk_that_is_full_before_a_sweep_begins_is_said_in_one_line(command, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", full)
    code, _, err = command("-m", "budget=0.5,0.25")
    assert code == 2 and "cannot write on (No space left on device); make room" in err and len(err.splitlines()) == 1


def test_a_sample_that_runs_out_of_memory_is_recorded_and_tried_again_next_time(command, tmp_path, monkeypatch):
    real = answer.through

    def short_of_memory(model, methods, plan, *args, **kwargs):
        if methods[0].name == "nacl" and sample_number("mat/1") in plan.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore text")
        return real(model, methods, plan, *args, **kwargs)

    monkeypatch.setattr(answer, "through", short_of_memory)
    code, out, err = command("batch_size=3")
    assert code == 1 and "failed: 1 of 6 samples with nacl: mat/1 (OutOfMemoryError: CUDA out of memory" in err
    assert "average" in out and "Traceback" not in err
    monkeypatch.setattr(answer, "through", real)
    assert command("batch_size=3")[0] == 0
    (path,) = (tmp_path / "results").glob("*/*/nacl-b*/samples.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["id"] for r in lines].count("mat/1") == 2 and len(lines) == 7 and "error" not in lines[-1]


def sample_number(id: str) -> int:
    return zlib.crc32(id.encode())


def test_samples_above_the_budget_count_with_their_bytes_and_are_said(command, tmp_path):
    """A window of 32 and one more slot are more than a twentieth of prompts of about a hundred tokens."""
    code, out, err = command("method=snapkv", "budget=0.05")
    assert code == 0 and "failed" not in err
    assert re.search(r"samples above the budget +6 of 6", out) and "average" in out
    rows = samples(tmp_path / "results", "snapkv")
    assert all("error" not in one for one in rows.values()) and len(rows) == 6
    for one in rows.values():
        book = one["ledger"]
        assert book["held_prompt"] > book["asked"] + book["overhead"]
        assert book["asked"] == math.ceil(0.05 * book["full_prompt"] - 1e-6)  # the request, not the floor
    code, out, _ = command("method=snapkv", "budget=0.9")
    assert code == 0 and "above the budget" not in out


def test_a_missed_budget_stops_the_cell_where_it_is_to_fail(command):
    code, out, err = command("method=snapkv", "budget=0.05", "budget_miss=fail")
    assert code == 1 and "budget=0.05 is missed and budget_miss=fail: snapkv: " in err and "were asked for" in err
    assert "average" not in out
    code, _, err = command("budget_miss=maybe")
    assert code == 2 and "budget_miss=maybe: give one of keep, fail" in err


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(command, tmp_path, monkeypatch):
    command(results=tmp_path / "undisturbed")
    real, calls = answer.through, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(answer, "through", interrupted)
    code, _, err = command()
    assert code == 130 and "Traceback" not in err
    assert "stopped; 4 samples of the full cache and 3 of nacl are kept" in err
    monkeypatch.setattr(answer, "through", real)
    assert command()[0] == 0
    assert without_times(samples(tmp_path / "results")) == without_times(samples(tmp_path / "undisturbed"))


def test_ctrl_c_ends_a_whole_sweep(command, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "answer_together", interrupted)
    code, out, err = command("-m", "budget=0.5,0.25", "protocol=aware,agnostic")
    assert code == 130 and err.count("stopped;") == 1 and "protocol=query_agnostic" not in out


def test_a_killed_run_goes_on_with_nothing_lost_or_done_twice(command, tmp_path, tiny_model_dir):
    split = write_split(tmp_path / "long", samples=6, new_tokens=32)
    data = f"task.data={split}"
    code, _, err = command(data, results=tmp_path / "undisturbed")
    assert code == 0, err
    results = tmp_path / "killed"
    child = os.fork()  # which needs no imports any more
    if not child:
        try:
            sys.stdout = sys.stderr = (tmp_path / "said").open("w", buffering=1)
            sys.argv = ["run.py", f"model.path={tiny_model_dir}", data, f"results={results}"]
            os._exit(run.main())
        finally:
            os._exit(99)
    before: list[str] = []
    ended, limit = (0, 0), time.monotonic() + 120
    while ended == (0, 0) and len(before) < 3 and time.monotonic() < limit:
        files = list(results.glob("*/*/nacl-b*/samples.jsonl"))
        before = files[0].read_text().splitlines() if files else []
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL, (tmp_path / "said").read_text()
    (path,) = results.glob("*/*/nacl-b*/samples.jsonl")
    with path.open("a") as file:
        file.write('{"id": "mat/5", "predic')  # the line that a kill may cut off
    code, _, err = command(data, results=results)
    assert code == 0, err
    assert path.read_text().splitlines()[: len(before)] == before
    assert 3 <= len(before) < 12
    assert without_times(samples(results)) == without_times(samples(tmp_path / "undisturbed"))
    assert len(list(results.glob("*/*/*"))) == 2  # both runs found the same cells


def test_other_conditions_are_not_mixed_unless_forced(command, tmp_path):
    command("task.limit=1")
    (path,) = (tmp_path / "results").glob("*/*/full-b*/cell.json")
    cell = json.loads(path.read_text())
    cell["runs"][0]["conditions"]["torch"] = "1.0"
    path.write_text(json.dumps(cell))
    assert command("task.limit=1")[0] == 0  # nothing to compute, nothing to mix
    code, _, err = command("task.limit=2")
    assert code == 2 and "torch was 1.0, is" in err and "resume=force" in err and len(err.splitlines()) == 1
    code, _, err = command("task.limit=2", "resume=force")
    assert code == 0, err
    assert len(json.loads(path.read_text())["runs"]) == 2
    assert {r["run"] for r in samples(tmp_path / "results", "full").values()} == {0, 1}


MINE = """from dataclasses import dataclass
from methods.core.eviction import Eviction


@dataclass
class Mine(Eviction):
    def score(self, store, step, cut):
        return SIGN * store.pos.float()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A method of the user's own, outside the tree; edit(text) writes it as a new process would read it."""
    conf = tmp_path / "conf" / "method"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("_target_: users_own.Mine\nbudget: ${budget}\nseed: ${seed}\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def edit(text: str) -> None:
        (tmp_path / "users_own.py").write_text(text)
        for name in ("users_own",):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        for kept in (revision._code, revision._read, revision._source, revision._lies):
            kept.cache_clear()

    edit(MINE.replace("SIGN", "1"))
    yield edit
    sys.modules.pop("users_own", None)
    for kept in (revision._code, revision._read, revision._source, revision._lies):
        kept.cache_clear()


def test_an_edited_method_is_computed_into_a_record_of_its_own_and_what_changed_is_said(command, tmp_path, mine):
    mine_in = (f"--config-dir={tmp_path / 'conf'}", "method=mine", "budget=0.3", "task.limit=1")
    results = tmp_path / "results"
    assert command(*mine_in)[0] == 0
    (old,) = results.glob("*/*/mine-*")
    before = (old / "samples.jsonl").read_bytes()
    mine(MINE.replace("SIGN", "1").replace("        return", "        # newest first\n        return"))
    code, _, err = command(*mine_in)
    assert code == 0 and "changed" not in err and len(list(results.glob("*/*/mine-*"))) == 1  # a comment is no change
    mine(MINE.replace("SIGN", "-1"))
    code, out, err = command(*mine_in)
    assert code == 0, err
    (new,) = set(results.glob("*/*/mine-*")) - {old}
    assert f"mine at budget=0.3: changed since {old.name} (code: users_own)" in err and "resume=old" in err
    assert f"record: {new}" in out and (old / "samples.jsonl").read_bytes() == before
    assert len(list(results.glob("*/*/full-*"))) == 1  # whose code is the same
    code, out, err = command(*mine_in)
    assert code == 0 and "changed" not in err and f"record: {new}" in out


@pytest.mark.slow
def test_resume_old_shows_the_older_record_and_computes_nothing(command, tmp_path, mine, monkeypatch):
    mine_in = (f"--config-dir={tmp_path / 'conf'}", "method=mine", "budget=0.3", "task.limit=1")
    code, _, err = command(*mine_in, "resume=old")
    assert code == 2 and "resume=old: " in err and "has no record of full" in err and len(err.splitlines()) == 1
    command(*mine_in)
    (old,) = (tmp_path / "results").glob("*/*/mine-*")
    mine(MINE.replace("SIGN", "-1"))
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("the model was loaded"))
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    code, out, err = command(*mine_in, "resume=old")
    assert code == 0 and f"record: {old}" in out, err
    code, out, err = command("-m", *mine_in[:2], "budget=0.3,0.4", "task.limit=2", "resume=old")
    assert code == 2 and "no record of mine at budget=0.4" in err
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")} == before


def test_resume_force_goes_on_in_the_older_record_and_notes_that_it_is_mixed(command, tmp_path, mine):
    mine_in = (f"--config-dir={tmp_path / 'conf'}", "method=mine", "budget=0.3")
    command(*mine_in, "task.limit=1")
    mine(MINE.replace("SIGN", "-1"))
    code, _, err = command(*mine_in, "task.limit=2", "resume=force")
    assert code == 0, err
    (folder,) = (tmp_path / "results").glob("*/*/mine-*")
    assert {row["run"] for row in samples(tmp_path / "results", "mine").values()} == {0, 1}
    assert len(json.loads((folder / "cell.json").read_text())["runs"]) == 2


def test_a_mended_stop_token_or_template_begins_a_record_of_its_own(command, tmp_path, tiny_model_dir):
    own = shutil.copytree(tiny_model_dir, tmp_path / "model")
    assert command(f"model.path={own}", "method=full", "task.limit=1")[0] == 0
    (old,) = (tmp_path / "results").glob("*/*/full-*")
    (own / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    code, _, err = command(f"model.path={own}", "method=full", "task.limit=2")
    assert code == 0 and f"changed since {old.name} (the model's files: generation_config.json)" in err
    (own / "chat_template.jinja").write_text("{{ strftime_now('%Y') }} {{ messages[-1].content }}")
    code, _, err = command(f"model.path={own}", "method=full", "task.limit=1", "model.date=2031-12-30")
    assert code == 0
    books = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    assert len(books) == 3 and [b["identity"]["model"].get("date") for b in books].count("2031-12-30") == 1
    sizes = sorted(len(p.read_text().splitlines()) for p in (tmp_path / "results").glob("*/*/*/samples.jsonl"))
    assert sizes == [2, 2, 4]


def test_a_record_of_an_earlier_form_is_found_under_its_own_name(command, tmp_path):
    command("task.limit=1")
    for method in ("full", "nacl"):
        (folder,) = (tmp_path / "results").glob(f"*/*/{method}-*")
        book = json.loads((folder / "cell.json").read_text())
        (run_of_it,) = book["runs"]
        book["format"], book["identity"]["model"]["weights"] = 1, run_of_it["conditions"].pop("weights")
        run_of_it["conditions"]["code"] = "of every byte"
        for name in ("began", "modules", "place"):
            run_of_it.pop(name)
        task, said = book["identity"]["task"], run_of_it.pop("samples")
        task["fingerprint"] |= said
        task.pop("data")
        (folder / "cell.json").write_text(json.dumps(book))
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        write_rows(folder / "samples.jsonl", [{k: v for k, v in one.items() if k != "key"} for one in rows])
        folder.rename(folder.with_name(f"{folder.name[:-8]}01234567"))
    code, out, err = command("task.limit=1", "resume=old")
    assert code == 0 and out.splitlines()[-1].endswith("nacl-b0.5-01234567"), err
    code, out, err = command("task.limit=1")
    assert code == 0 and "nacl at budget=0.5: changed since nacl-b0.5-01234567 (code was of every byte, is " in err
    assert not out.splitlines()[-1].endswith("01234567") and len(list((tmp_path / "results").glob("*/*/nacl-*"))) == 2


def test_a_sweep_runs_every_cell_also_behind_one_that_cannot_work(command, tmp_path):
    code, _, err = command("-m", "method=full,nacl", "budget=1.5,0.5,0.25", "task.limit=1")
    assert code == 2 and "budget=1.5: a share lies in (0, 1]" in err and "Traceback" not in err
    cells = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "results").glob("*/*/*"))
    assert cells == ["full-b1", "nacl-b0.25", "nacl-b0.5"]


def test_a_run_leaves_nothing_but_its_results_behind(command, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command("task.limit=1", results="results")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["results"]


def test_an_unreachable_hub_is_said_within_seconds(command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("runners.engine.sources.hub.unreachable", lambda url: "no answer within 5 s")
    began = time.monotonic()
    code, _, err = command("model.path=someone/some-model")
    assert code == 2 and time.monotonic() - began < 5
    assert "no answer within 5 s" in err and "model.path=DIR" in err and "HF_HUB_OFFLINE=1" in err
