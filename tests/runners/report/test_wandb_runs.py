"""Runs of Weights & Biases: read back from disk beside the record, resumed, and never in the way of a result."""

import json
import socket
import struct
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from runners import model_setup
from runners.report.wandb_runs import COLUMNS
from tests.test_run import samples, write_split

BLOCK = 32768  # of the log that a run is written to


@pytest.fixture
def command(tmp_path, tiny_model_dir, run_command):
    """command(*overrides) -> (exit code, stdout, stderr), on a small split of its own."""
    split = write_split(tmp_path / "split")
    given = (f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / 'results'}")
    return partial(run_command, *given)


def messages(path: Path) -> list[Any]:
    """Everything in a run's file: records in blocks, each piece behind its checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data, at, piece, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + size] if kind in (1, 2) else piece + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            message = protocol.Record()
            message.ParseFromString(piece)
            found.append(message)
    return found


class Offline:
    """One run on disk. config, summary: what they end as; series: the lines over samples."""

    def __init__(self, folder: Path):
        self.folder, self.id = folder, folder.name.rpartition("-")[2]
        self.config: dict = {}
        self.summary: dict = {}
        self.series: list[dict] = []
        for message in messages(folder / f"run-{self.id}.wandb"):
            kind = message.WhichOneof("record_type")
            if kind == "run":
                self.kind, self.group, self.name = message.run.job_type, message.run.run_group, message.run.display_name
                self.project, self.tags = message.run.project, list(message.run.tags)
                self.config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
            elif kind == "summary":
                self.summary |= {item.key: json.loads(item.value_json) for item in message.summary.update if item.key}
            elif kind == "history":
                line = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in message.history.item}
                if "sample" in line:
                    self.series.append(line)

    def table(self, name: str) -> list[dict]:
        (path,) = (self.folder / "files" / "media" / "table").glob(f"{name}_*.table.json")
        table = json.loads(path.read_text())
        return [dict(zip(table["columns"], line)) for line in table["data"]]


def runs(results: Path) -> list[Offline]:
    return [Offline(folder) for folder in sorted((results / "wandb").glob("offline-run-*"))]


def of_method(results: Path, method: str) -> list[Offline]:
    return [one for one in runs(results) if one.kind == "cell" and one.config["method"] == method]


def rescore(results: Path, method: str, scores: dict[str, float]) -> None:
    """Give a record's samples scores by subset: a random model has none that a figure could show."""
    (path,) = results.glob(f"*/*/{method}-b*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**r, "score": scores[r["tags"]["subset"]]}) + "\n" for r in rows))


def test_offline_runs_hold_what_the_records_hold(command, tmp_path):
    command()
    results = tmp_path / "results"
    rescore(results, "full", {"river": 1.0, "mat": 1.0})
    rescore(results, "nacl", {"river": 0.5, "mat": 1.0})
    code, _, err = command("wandb=offline", "wandb.project=caches", "wandb.group=first", "wandb.tags=[a,b]")
    assert code == 0 and "wandb" not in err
    (folder,) = results.glob("*/*/nacl-b*")
    book, rows = json.loads((folder / "cell.json").read_text()), samples(results)
    (sent,) = of_method(results, "nacl")
    assert (sent.name, sent.project, sent.group, sent.tags) == (folder.name, "caches", "first", ["a", "b"])
    assert sent.config["identity"] == book["identity"] and sent.config["runs"] == book["runs"]
    assert sent.config["budget"] == 0.5 and "wandb" not in book["runs"][0]["command"]

    summary = sent.summary
    assert (summary["n"], summary["failed"]) == (6, 0)
    assert (summary["score"], summary["full"], summary["difference"]) == (75.0, 100.0, -25.0)
    assert (summary["rows"]["river"]["score"], summary["rows"]["mat"]["difference"]) == (50.0, 0.0)
    for name in ("held_prompt", "held_end", "full", "share"):
        assert summary["ledger"][name] == pytest.approx(fmean(row["ledger"][name] for row in rows.values()))

    table = sent.table("samples")
    assert list(table[0]) == COLUMNS and [line["id"] for line in table] == sorted(rows)
    for line in table:
        row = rows[line["id"]]
        assert (line["prediction"], line["score"]) == (row["prediction"], row["score"])
        assert line["held_prompt"] == row["ledger"]["held_prompt"]
        assert line["prompt_s"] == (None if "group" in row else row["timings"]["prompt"])  # a group's time is nobody's

    for line, (_, row) in zip(sent.series, sorted(rows.items()), strict=True):
        times = row["timings"]
        assert line["sample_score"] == row["score"]
        if "group" in row:
            assert "prompt_tokens_per_s" not in line and "decode_ms_per_token" not in line
            continue
        assert line["prompt_tokens_per_s"] == pytest.approx(times["n_prompt"] / times["prompt"])
        assert line["decode_ms_per_token"] == pytest.approx(1000 * times["decode"] / times["steps"])

    (frontier,) = [one for one in runs(results) if one.kind == "frontier"]
    points = [line for line in frontier.table("points") if line["category"] == "all"]
    assert {(line["label"], round(line["score"], 6)) for line in points} == {("full", 100.0), ("nacl", 75.0)}
    (picture,) = (frontier.folder / "files" / "media" / "images").glob("frontier_*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_cell_that_goes_on_goes_on_in_the_same_run(command, tmp_path, monkeypatch):
    command("wandb=offline", "task.limit=1")
    command("wandb=offline")
    first, second = of_method(tmp_path / "results", "nacl")
    assert first.id == second.id
    assert [line["sample"] for line in first.series + second.series] == [0, 1, 2, 3, 4, 5]
    assert (first.summary["n"], second.summary["n"]) == (2, 6)
    # what was sent is not sent again, nor a part of it
    monkeypatch.setattr(model_setup, "load_model", lambda *a: pytest.fail("the model was loaded"))
    before = len(runs(tmp_path / "results"))
    assert command("wandb=offline")[0] == command("wandb=offline", "task.limit=1")[0] == 0
    assert len(runs(tmp_path / "results")) == before


@pytest.mark.slow
def test_a_sweep_sends_each_of_its_cells_without_speeds(command, tmp_path):
    code, _, err = command("-m", "method=nacl,snapkv", "budget=0.5", "wandb=offline")
    results = tmp_path / "results"
    # a random model's scores are no better than chance
    assert code == 0 and err.count("no frontier figure") == 1
    sent = [one for one in runs(results) if one.kind == "cell"]
    assert sorted(one.config["method"] for one in sent) == ["full", "nacl", "snapkv"]
    for one in sent:
        assert one.group.endswith("/longbench-custom/aware")
        assert "held_prompt" in one.series[0] and "decode_ms_per_token" not in one.series[0]
        assert one.summary["timings"] == {} and one.table("samples")[0]["decode_s"] is None


@pytest.mark.slow
def test_samples_with_a_length_and_a_depth_send_their_heat_map(command, tmp_path):
    essays = tmp_path / "essays"
    essays.mkdir()
    text = " ".join(f"Sentence {i} tells of a river, a road and a mill." for i in range(60))
    (essays / "one.txt").write_text(text)
    grid = ("task.kinds=[single]", "task.lengths=[0.75]", "task.depths=[0,100]", "model.max_length=2000")
    code, _, err = command("task=needle", f"task.data={essays}", "method=snapkv", *grid, "wandb=offline")
    assert code == 0, err
    (sent,) = of_method(tmp_path / "results", "snapkv")
    (picture,) = (sent.folder / "files" / "media" / "images").glob("heat_map_*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_without_a_key_it_goes_on_offline_and_says_so_once(command, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **options: False)
    code, out, err = command("wandb=online")
    assert code == 0 and "record:" in out
    assert err.count("going on offline") == 1 and "wandb sync" in err
    assert len(of_method(tmp_path / "results", "nacl")) == len(of_method(tmp_path / "results", "full")) == 1


@pytest.mark.slow
def test_without_a_network_it_goes_on_offline_in_the_same_runs_and_says_so_once(command, tmp_path, monkeypatch):
    import wandb

    command("wandb=offline", "task.limit=1")
    before = {(one.kind, one.id) for one in runs(tmp_path / "results") if one.kind == "cell"}
    wandb.teardown()  # what reads the environment
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    try:
        code, out, err = command("wandb=online")
        assert code == 0 and "record:" in out and len(samples(tmp_path / "results")) == 6
        assert err.count("going on offline") == 1 and "wandb sync" in err and "Traceback" not in err
        sent = [one for one in runs(tmp_path / "results") if one.kind == "cell"]
        assert len(sent) == 4 and {(one.kind, one.id) for one in sent} == before
        # the network is asked again next time, and only what is new then goes on offline
        code, _, err = command("wandb=online", "task.limit=1")
        assert code == 0 and err.count("going on offline") == 1
        assert len([one for one in runs(tmp_path / "results") if one.kind == "cell"]) == 4
    finally:
        wandb.teardown()


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_wandb_that_the_environment_disables_writes_nothing_and_says_why(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    code, out, err = command("wandb=online", "task.limit=1")
    assert code == 0 and "record:" in out
    assert err.count("WANDB_MODE=disabled is set in the environment; nothing is written") == 1 and "key" not in err
    assert not (tmp_path / "results" / "wandb").exists() and not list((tmp_path / "results").rglob(".wandb*"))


def test_what_cannot_be_written_at_all_is_said_once_and_fails_nothing(command, tmp_path, monkeypatch):
    import wandb

    def broken(**options):
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", broken)
    code, out, err = command("wandb=offline")
    assert code == 0 and "record:" in out and err.count("no room") == 1
    assert len(samples(tmp_path / "results")) == 6


def test_by_default_nothing_is_written(command, tmp_path):
    command()
    assert not (tmp_path / "results" / "wandb").exists() and not list((tmp_path / "results").rglob(".wandb*"))


def test_a_mode_that_is_none_is_refused(command):
    code, _, err = command("wandb.mode=sometimes")
    assert code == 2 and "wandb.mode=sometimes" in err and "offline" in err
