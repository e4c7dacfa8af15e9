"""Sweeps on a real SLURM: one array per sweep, jobs that are interrupted in the middle and go on, their logs."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from tests.test_run import write_split
from tests.test_sweep import comparable, records

pytestmark = pytest.mark.slurm

ROOT = Path(run.__file__).parent
GRID = ("-m", "method=full,nacl,snapkv", "budget=0.5")
CELLS = 3
# eight groups: what these differ in changes the prompt's pass
EIGHT = (*GRID, "task.subset=[river],[mat]", "protocol=aware,agnostic", "batch_size=1,2")
SAMPLES = 40  # of a subset
PATIENCE = 600  # seconds; a machine that is busy with other things takes half a minute to import torch
SLURM = ("hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1",
         "hydra.launcher.array_parallelism=2", "hydra.launcher.timeout_min=60")  # fmt: skip


@pytest.fixture
def start(cluster, tmp_path, tiny_model_dir) -> Callable[..., subprocess.Popen]:
    """Starts the command line in a process of its own, outside the checkout."""
    split = write_split(tmp_path / "split", samples=SAMPLES, new_tokens=32)

    def start_it(*overrides: str, results: str = "results") -> subprocess.Popen:
        settings = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / results}"]
        command = [sys.executable, str(ROOT / "run.py"), *overrides, *settings]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start_it


def job(id: str) -> dict[str, str]:
    """What the controller knows of a job."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", id], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def in_the_middle(results: Path, but: set[str]) -> str:
    """Waits for a job, none of `but`, that has recorded some samples and has most before it; its id."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        rows: dict[str, list[int]] = {}
        for path in results.glob("*/*/*/samples.jsonl"):
            lines = path.read_bytes().count(b"\n")
            for log in path.parent.glob("*_log.out"):
                rows.setdefault(log.name.removesuffix("_0_log.out"), []).append(lines)
        for id, counts in rows.items():
            if id not in but and min(counts) > 1 and max(counts) < SAMPLES // 4:
                return id
        time.sleep(0.05)
    pytest.fail(f"no job was seen in the middle of its work: {rows}")


def log_of(results: Path, id: str) -> str:
    return next(results.glob(f"*/*/*/{id}_0_log.out")).read_text()


def test_an_array_of_eight_groups_interrupted_three_times_ends_complete(start, tmp_path):
    sweep, results = start(*EIGHT, *SLURM), tmp_path / "results"
    requeued = in_the_middle(results, set())
    subprocess.run(["scontrol", "requeue", requeued], check=True)
    signalled = in_the_middle(results, {requeued})
    # it fails where it tries again and the job has already gone; whether the signal came, the job's restart tells
    subprocess.run(["scancel", "--signal=USR2", signalled])
    preempted = in_the_middle(results, {requeued, signalled})
    subprocess.run(["srun", "--partition=high", "--exclusive", "--immediate=120", "true"], check=True)
    out, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, (out, err)

    array, tasks = re.findall(r"slurm: job (\d+), (\d+) tasks", out)[0]
    assert tasks == "8" and {requeued, signalled, preempted} <= {f"{array}_{i}" for i in range(8)}
    script = next(results.glob(".hydra-runs/.submitit/*/*submission*.sh")).read_text()
    assert "--array=0-7%2" in script and "--requeue" in script and "--partition=low" in script
    for id in (requeued, signalled, preempted):
        assert int(job(id)["Restarts"]) >= 1, job(id)
        text = log_of(results, id)
        assert "starts again" in text and re.search(rf"\d+ of {SAMPLES} samples are on disk", text)

    undisturbed = start(*EIGHT, results="undisturbed")
    assert undisturbed.wait(timeout=PATIENCE) == 0
    assert comparable(results) == comparable(tmp_path / "undisturbed")  # fails for a sample that is there twice
    rows = records(results)
    assert len(rows) == 8 * CELLS and {len(own) for own in rows.values()} == {SAMPLES}
    for folder in (path.parent for path in results.glob("*/*/*/samples.jsonl")):
        assert [log.is_file() and not os.path.isabs(os.readlink(log)) for log in folder.glob("*_log.out")] == [True]


def test_shards_of_a_group_share_its_samples_in_one_array(start, tmp_path):
    sweep = start(*GRID, *SLURM, "hydra.sweeper.shards=2", "task.limit=10")
    out, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, (out, err)
    assert re.search(r"slurm: job \d+, 2 tasks", out)
    for cell, rows in records(tmp_path / "results").items():
        assert len({row["id"] for row in rows}) == len(rows) == 20, cell


def test_a_cancelled_job_ends_at_once_is_said_and_goes_on_by_the_same_command(start, tmp_path):
    grid = (*GRID, "batch_size=1,2", *SLURM)
    sweep, results = start(*grid), tmp_path / "results"
    cancelled = in_the_middle(results, set())
    subprocess.run(["scancel", cancelled], check=True)
    _, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 1 and f"failed: slurm job {cancelled} (CANCELLED)" in err and "Traceback" not in err
    assert job(cancelled)["Restarts"] == "0"
    kept = {cell: len(rows) for cell, rows in records(results).items()}
    assert set(kept.values()) > {2 * SAMPLES} and min(kept.values()) > 1
    again = start(*grid)
    assert again.wait(timeout=PATIENCE) == 0
    assert {len({row["id"] for row in rows}) for rows in records(results).values()} == {2 * SAMPLES}


def test_a_mistake_is_said_in_one_line(start):
    sweep = start(*GRID, *SLURM, "hydra.launcher.partition=nowhere")
    _, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 2 and "invalid partition" in err and "Traceback" not in err


def test_a_plan_is_made_without_a_job(start, tmp_path):
    sweep = start(*GRID, *SLURM, "plan=true", "task.limit=1")
    out, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0 and f"read once for {CELLS} cells" in out, err
    assert not list((tmp_path / "results").glob(".hydra-runs/.submitit/*"))
