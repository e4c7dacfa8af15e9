"""Processes of one machine: each has a GPU of its own, and what a job says comes back."""

import sys
from pathlib import Path

import pytest
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor

import run
from hydra_plugins.local_launcher import VISIBLE, on_own_gpu, visible_gpus, workers
from tests.test_run import write_split
from tests.test_sweep import records


@pytest.fixture(autouse=True)
def processes_end():
    yield
    get_reusable_executor().shutdown()


# for `eval`, so that a process has nothing to import: what it is and which GPU it sees, while others are there too
LOOK = "(__import__('time').sleep(0.2), __import__('os').getpid(), __import__('os').environ['CUDA_VISIBLE_DEVICES'])"


@pytest.fixture
def seen(tmp_path):
    """What each of some jobs saw on GPUs of these names: (process, GPU)."""
    locks = tmp_path / "locks"
    locks.touch()

    def see(gpus: list[str], processes: int, jobs: int) -> list[tuple[int, str]]:
        run_one = delayed(on_own_gpu)
        found = Parallel(n_jobs=processes, backend="loky")(run_one(gpus, str(locks), eval, LOOK) for _ in range(jobs))
        return [pair for _, *pair in found]

    return see


def test_every_process_sees_one_gpu_and_no_two_the_same(seen):
    found = set(map(tuple, seen(["3", "GPU-5"], processes=2, jobs=8)))
    assert len(found) == len({process for process, _ in found}) == 2, "a process went from one GPU to another"
    assert {gpu for _, gpu in found} == {"3", "GPU-5"}


def test_the_gpus_of_processes_that_have_ended_are_free_again(seen):
    before = seen(["7", "8"], processes=2, jobs=4)
    get_reusable_executor().shutdown()
    after = seen(["7", "8"], processes=2, jobs=4)
    assert not {process for process, _ in before} & {process for process, _ in after}
    assert {gpu for _, gpu in after} == {"7", "8"}


def test_without_a_gpu_nothing_is_hidden(monkeypatch):
    monkeypatch.setenv(VISIBLE, "8")
    assert on_own_gpu([], "", eval, LOOK)[2] == "8"


def test_gpus_are_those_that_are_visible_and_bound_the_processes(monkeypatch):
    monkeypatch.setenv(VISIBLE, "0, 2,GPU-9")
    assert visible_gpus() == ["0", "2", "GPU-9"]
    for hidden in ("", "-1"):
        monkeypatch.setenv(VISIBLE, hidden)
        assert visible_gpus() == []
    assert [workers(asked, ["0", "1"]) for asked in (None, 1, 8)] == [2, 1, 2]
    assert [workers(asked, []) for asked in (None, 1, 8)] == [4, 1, 8]


def sweep(monkeypatch, tiny_model_dir, tmp_path: Path, *overrides: str) -> int:
    split = write_split(tmp_path / "split")
    settings = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / 'results'}"]
    grid = ["-m", "method=full,snapkv", "hydra/launcher=local"]
    monkeypatch.setattr(sys, "argv", ["run.py", *grid, *settings, *overrides])
    return run.main()


@pytest.mark.slow
def test_groups_are_processes_that_write_their_records(monkeypatch, tiny_model_dir, tmp_path):
    overrides = ("task.subset=[river],[mat]", "hydra.launcher.n_jobs=2")
    assert sweep(monkeypatch, tiny_model_dir, tmp_path, *overrides) == 0
    # a subset is a choice of samples: both groups write to the same two records
    found = records(tmp_path / "results")
    assert len(found) == 2 and [len({row["id"] for row in rows}) for rows in found.values()] == [6, 6]


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, tiny_model_dir, tmp_path, capfd):
    assert sweep(monkeypatch, tiny_model_dir, tmp_path, "hydra.launcher.n_jobs=0") == 2
    assert "hydra.launcher.n_jobs=0" in capfd.readouterr().err
