"""Sweeps on a real SLURM: one array per sweep, jobs that are interrupted in the middle and go on, their logs.

A job stays in the middle of its work for as long as the test itself holds the locks on its last samples: nothing here
depends on how fast a job is, or on when the test looks.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import run
from runners.records.sample_locks import SampleLocks
from tests.test_run import write_split
from tests.test_sweep import comparable, records

pytestmark = pytest.mark.slurm

ROOT = Path(run.__file__).parent
GRID = ("-m", "method=full,nacl,snapkv", "budget=0.5", "task.subset=[river]")
CELLS = 3
# eight groups: what these differ in changes the prompt's pass, and the folder (which subsets would share)
# batches of one and two: what is held back is whole batches
EIGHT = (*GRID, "protocol=query_aware,query_agnostic", "batch_size=1,2", "chunk=null,32")
SAMPLES, LEFT = 6, 2  # of a subset, and how many of them are held back
PATIENCE = 600  # seconds; a machine that is busy with other things takes half a minute to import torch
SLURM = ("hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1",
         "hydra.launcher.array_parallelism=2", "hydra.launcher.timeout_min=60")  # fmt: skip


@pytest.fixture
def settings(tmp_path, tiny_model_dir) -> list[str]:
    split = write_split(tmp_path / "split", samples=SAMPLES)
    return [f"model.path={tiny_model_dir}", f"task.data={split}"]


@pytest.fixture
def start(cluster, tmp_path, settings) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the command line in a process of its own, outside the checkout; it ends with the test."""
    started = []

    def start_it(*overrides: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "run.py"), *overrides, *settings, f"results={tmp_path / 'results'}"]
        sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(sweep)
        return sweep

    yield start_it
    for sweep in started:
        if sweep.poll() is None:
            sweep.kill()
            sweep.communicate()


@pytest.fixture
def here(settings, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Runs a command line in this process, without a cluster; returns its results."""

    def run_it(*overrides: str) -> Path:
        results = tmp_path / "undisturbed"
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *settings, f"results={results}"])
        assert run.main() == 0
        return results

    return run_it


class Held:
    """The locks on the last samples of some groups of the undisturbed records, in the folder of another sweep."""

    def __init__(self, undisturbed: Path, results: Path, groups: int):
        folders = sorted(undisturbed.glob("*/*/full-*"))[:groups]
        self.results = results
        self.locks = {}
        for folder in folders:
            ids = [row["id"] for row in records(undisturbed)[folder.name]][-LEFT:]
            locks = SampleLocks(results / folder.relative_to(undisturbed))
            held = locks.hold(ids)
            assert held.__enter__()
            self.locks[results / folder.relative_to(undisturbed)] = (locks, held)

    def waits(self) -> tuple[str, Path]:
        """Waits for a job that runs and has recorded all samples but the held ones: its id and the group's folder."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for folder in self.locks:
                logs = list(folder.glob("*_0_log.out"))
                done = all(
                    path.read_bytes().count(b"\n") == SAMPLES - LEFT for path in folder.glob("samples.jsonl")
                ) and (folder / "samples.jsonl").exists()  # fmt: skip
                if logs and done:
                    id = logs[0].name.removesuffix("_0_log.out")
                    if job(id).get("JobState") == "RUNNING":
                        return id, folder
            time.sleep(0.2)
        pytest.fail(f"no job was seen in the middle of its work:\n{told(self.results)}")

    def let_go(self, folder: Path) -> None:
        locks, held = self.locks.pop(folder)
        held.__exit__(None, None, None)
        locks.close()


def job(id: str) -> dict[str, str]:
    """What the controller knows of a job."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", id], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def restarts(id: str) -> int:
    return int(job(id).get("Restarts", 0))


def starts_again(results: Path, id: str, before: int) -> None:
    """Waits until a job was taken back to be started once more."""
    until = time.monotonic() + PATIENCE
    while restarts(id) <= before:
        if time.monotonic() > until:
            pytest.fail(f"job {id} was not requeued:\n{told(results)}")
        time.sleep(0.2)


def told(results: Path) -> str:
    """What the cluster and the jobs' logs have to say, for a test that fails."""
    queue = subprocess.run(["squeue", "--all", "--array"], capture_output=True, text=True).stdout
    logs = sorted(results.glob(".hydra-runs/.submitit/*/*_log.out"))
    return "\n".join([queue, *(f"{log.name}:\n{log.read_text()[-1500:]}" for log in logs)])


def end(sweep: subprocess.Popen, results: Path) -> tuple[str, str]:
    """What a sweep has said, once it is done."""
    try:
        return sweep.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the sweep did not end:\n{told(results)}")


def test_an_array_of_eight_groups_interrupted_three_times_ends_complete(start, here, tmp_path):
    undisturbed, results = here(*EIGHT), tmp_path / "results"
    held = Held(undisturbed, results, groups=3)
    sweep = start(*EIGHT, *SLURM)
    interrupted = []

    def interrupt(*command: str) -> None:
        id, folder = held.waits()
        before = restarts(id)
        # scancel repeats itself for minutes where a job that got its signal has gone at once
        tool = subprocess.Popen([word.replace("JOB", id) for word in command], stderr=subprocess.DEVNULL)
        starts_again(results, id, before)
        if command[0] == "scancel":
            tool.kill()
        tool.wait(timeout=PATIENCE)
        held.let_go(folder)
        interrupted.append((id, folder))

    interrupt("scontrol", "requeue", "JOB")
    interrupt("scancel", "--signal=USR2", "JOB")  # what comes before the end of a job's time
    interrupt("srun", "--partition=high", "--exclusive", "--immediate=120", "true")  # preempts what runs
    out, err = end(sweep, results)
    assert sweep.returncode == 0, (out, err, told(results))

    array, tasks = re.findall(r"slurm: job (\d+), (\d+) tasks", out)[0]
    assert tasks == "8" and {id for id, _ in interrupted} <= {f"{array}_{i}" for i in range(8)}
    script = next(results.glob(".hydra-runs/.submitit/*/*submission*.sh")).read_text()
    assert "--array=0-7%2" in script and "--requeue" in script and "--partition=low" in script
    for id, folder in interrupted:
        text = (folder / f"{id}_0_log.out").read_text()
        assert "starts again" in text and f"{SAMPLES - LEFT} of {SAMPLES} samples are on disk" in text, text

    assert comparable(results) == comparable(undisturbed)  # fails for a sample that is there twice
    rows = records(results)
    assert len(rows) == 8 * CELLS and {len(own) for own in rows.values()} == {SAMPLES}
    for folder in (path.parent for path in results.glob("*/*/*/samples.jsonl")):
        assert [log.is_file() and not os.path.isabs(os.readlink(log)) for log in folder.glob("*_log.out")] == [True]


def test_shards_of_a_group_share_its_samples_in_one_array(start, tmp_path):
    sweep = start(*GRID, *SLURM, "hydra.sweeper.shards=2")
    out, err = end(sweep, tmp_path / "results")
    assert sweep.returncode == 0, (out, err, told(tmp_path / "results"))
    assert re.search(r"slurm: job \d+, 2 tasks", out)
    for cell, rows in records(tmp_path / "results").items():
        assert len({row["id"] for row in rows}) == len(rows) == SAMPLES, cell


def test_a_cancelled_job_ends_at_once_is_said_and_goes_on_by_the_same_command(start, here, tmp_path):
    grid = (*GRID, "batch_size=1,2")
    undisturbed, results = here(*grid), tmp_path / "results"
    held = Held(undisturbed, results, groups=1)
    sweep = start(*grid, *SLURM)
    cancelled, folder = held.waits()
    subprocess.run(["scancel", cancelled], check=True, timeout=PATIENCE)
    _, err = end(sweep, results)
    assert sweep.returncode == 1 and f"failed: slurm job {cancelled} (CANCELLED)" in err and "Traceback" not in err
    assert restarts(cancelled) == 0
    kept = {cell: len(rows) for cell, rows in records(results).items()}
    assert set(kept.values()) == {SAMPLES, SAMPLES - LEFT} and kept[folder.name] == SAMPLES - LEFT
    held.let_go(folder)
    again = start(*grid, *SLURM)
    _, err = end(again, results)
    assert again.returncode == 0, (err, told(results))
    assert comparable(results) == comparable(undisturbed)


def test_a_mistake_is_said_in_one_line(start, tmp_path):
    sweep = start(*GRID, *SLURM, "hydra.launcher.partition=nowhere")
    _, err = end(sweep, tmp_path / "results")
    assert sweep.returncode == 2 and "invalid partition" in err and "Traceback" not in err


def test_a_plan_is_made_without_a_job(start, tmp_path):
    sweep = start(*GRID, *SLURM, "plan=true", "task.limit=1")
    out, err = end(sweep, tmp_path / "results")
    assert sweep.returncode == 0 and f"read once for {CELLS} cells" in out, err
    assert not list((tmp_path / "results").glob(".hydra-runs/.submitit/*"))
