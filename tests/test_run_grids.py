"""The tasks needle and ruler from the command line, on a tiny random model whose tokenizer counts the prompts."""

import errno
import json
from functools import partial
from pathlib import Path

import pytest

from runners.report import heat_map

ESSAY = " ".join(f"Sentence {i} tells of a river, a road and a mill." for i in range(60))


@pytest.fixture
def command(tmp_path, tiny_model_dir, run_command):
    """command(*overrides) -> (exit code, stdout, stderr); essays lie in `tmp_path/essays`."""
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "one.txt").write_text(ESSAY)
    given = (f"model.path={tiny_model_dir}", "model.max_length=2000", f"results={tmp_path / 'results'}")
    return partial(run_command, *given, f"task.data={tmp_path / 'essays'}")


def records(folder: Path, method: str) -> list[dict]:
    (path,) = (folder / "results").glob(f"*/*/{method}-b*/samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_a_grid_is_made_for_the_models_tokenizer_and_nothing_is_cut(command, tmp_path, protocol):
    kinds = "task.kinds=[single,multi_query,passkey]"
    code, out, err = command(
        "task=needle", "method=snapkv", "budget=0.25", kinds, "task.lengths=[0.75]", "task.depths=[0,100]",
        f"protocol=query_{protocol}",
    )  # fmt: skip
    assert code == 0, err
    first = out.splitlines()[0]
    assert first.startswith(f"needle (in {tmp_path / 'essays'}, sha256 ") and first.endswith("2 depths, 6 samples")
    rows = records(tmp_path, "snapkv")
    assert {row["id"] for row in rows} == {
        f"{kind}/1500/{depth}/0" for kind in ("single", "multi_query", "passkey") for depth in (0, 100)
    }
    assert not any(row["cut"] for row in rows) and all(row["tokens_in"] <= 1500 for row in rows)
    assert "length 1500" in out and "depth 100 %" in out and "6 cells: " in out
    assert len(list((tmp_path / "results").glob("*/*/*/heat_map.png"))) == 2  # of the method and of the full cache


@pytest.mark.parametrize("grid", [(), ("-m",)])
def test_heat_maps_that_a_full_disk_has_no_room_for_cost_nothing_else(command, tmp_path, monkeypatch, grid):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heat_map, "heat_map", full)
    words = ("task=needle", "method=snapkv", "task.kinds=[single]", "task.lengths=[0.75]", "task.depths=[0]")
    code, out, err = command(*grid, *words)
    assert code == 0 and err.count("no heat maps: No space left on device") == 1 and "record" in out.splitlines()[-1]


def test_ruler_is_made_for_the_models_tokenizer(command, tmp_path):
    code, out, err = command(
        "task=ruler", "method=snapkv", "budget=0.5", "task.subset=[niah_single_1,vt,fwe]", "task.lengths=[2000]",
        "task.samples=1", "task.sentences=marks",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith(f"ruler (made with {tmp_path / 'essays'}), 3 tasks")  # none of which hides in essays
    rows = records(tmp_path, "snapkv")
    assert [row["id"] for row in rows] == [f"{task}/2000/0" for task in ("niah_single_1", "vt", "fwe")]
    assert not any(row["cut"] for row in rows)
    assert all(row["tokens_in"] + new <= 2000 for row, new in zip(rows, (128, 30, 50)))


def test_a_length_beyond_the_model_ends_with_one_line(command):
    code, _, err = command("task=needle", "method=snapkv", "task.lengths=[4000]")
    assert code == 2 and "error: needle: task.lengths=4000 tokens; this model takes 2000" in err
