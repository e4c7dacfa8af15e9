"""`hydra/launcher=local`: the jobs of a sweep as processes of this machine, each on its own GPU where there are any.

Hydra's plugin for joblib keeps the processes. Which GPU a process has is settled by a lock that lives as long as it
does, so that one that is replaced gives its GPU back.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra_plugins.hydra_joblib_launcher import joblib_launcher

from methods.core.errors import UserError
from runners.stopping import end_with

VISIBLE = "CUDA_VISIBLE_DEVICES"
# processes at a time where there is no GPU to count
PROCESSES = 4


class LocalLauncher(joblib_launcher.JoblibLauncher):
    """Processes of this machine; its other settings are those of joblib's `Parallel`.

    n_jobs: processes at a time, with GPUs never more than these; None: one per GPU, without any 4.
    """

    def __init__(self, n_jobs: int | None = None, **joblib: Any):
        super().__init__(**joblib)
        if n_jobs is not None and (isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1):
            raise UserError(f"hydra.launcher.n_jobs={n_jobs}: give a whole number, 1 or more, or null")
        self.n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; what each returned, in their order."""
        from hydra_plugins.hydra_joblib_launcher._core import execute_job, process_joblib_cfg
        from joblib import Parallel, delayed

        assert self.config is not None
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        gpus = visible_gpus()
        settings = {**self.joblib, "backend": "loky", "n_jobs": workers(self.n_jobs, gpus)}
        process_joblib_cfg(settings)
        state = Singleton.get_state()
        jobs = (
            delayed(in_worker)(
                os.getpid(), gpus, _locks().name, execute_job, i, overrides, self.hydra_context, self.config,
                self.task_function, state,
            )
            for i, overrides in enumerate(job_overrides, initial_job_idx)
        )  # fmt: skip
        return list(Parallel(**settings)(jobs))


@cache
def _locks() -> Any:
    """The file of the locks, until this process ends: its workers outlive a batch of jobs."""
    return tempfile.NamedTemporaryFile(prefix="kvfrontier-gpus-")


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def workers(asked: int | None, gpus: Sequence[str]) -> int:
    """Processes at a time: no two of them on one GPU."""
    return min(asked or len(gpus), len(gpus)) if gpus else asked or PROCESSES


def in_worker(parent: int, *job: Any) -> Any:
    """`on_own_gpu(*job)` in a process that does not outlive the one that started it."""
    end_with(parent)
    return on_own_gpu(*job)


def on_own_gpu(gpus: Sequence[str], locks: str, job: Callable[..., Any], *args: Any) -> Any:
    """`job(*args)`, in a process that sees one of the GPUs only, and the same one for all its jobs.

    locks: an empty file that all processes have in common.
    """
    if gpus:
        os.environ[VISIBLE] = gpus[_claimed(len(gpus), locks)]
    return job(*args)


def _claimed(n: int, locks: str) -> int:
    """The number of this process's GPU; waits for one while other processes have them all."""
    if locks not in _CLAIMS:
        file = os.open(locks, os.O_RDWR)  # never closed: the lock ends with the process
        while (place := next((i for i in range(n) if _locked(file, i)), None)) is None:
            time.sleep(0.1)
        _CLAIMS[locks] = place
    return _CLAIMS[locks]


def _locked(file: int, place: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    return True


_CLAIMS: dict[str, int] = {}  # of this process, by the file of its locks
