"""`hydra/launcher=slurm`: the jobs of a sweep as one SLURM job array that survives preemption.

Hydra's plugin for submitit and submitit write the batch script, carry the job over, and requeue it at the signal that
comes before its time is up. Here is what they lack: stopping at SIGTERM, a log that records link to, and an end that
waits for every job and says what became of each. A job that starts again goes on from the records.
"""

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from methods.core.errors import UserError
from methods.core.home import PREFIX, ROOT
from runners.jobs import Failed
from runners.records.job_log import LOG

if TYPE_CHECKING:
    from submitit import Job

# settings that submitit knows for every kind of cluster; it wants the others to begin with `slurm_`
COMMON = {field.name for field in dataclasses.fields(BaseQueueConf)}

# Of the batch script, around what submitit runs. A preempted job is given a moment with SIGTERM: it is still called
# running then, and if it ends of itself nobody starts it again unless it asks. One that is cancelled, or requeued from
# outside, is not running any more. The signals may also come before Python has begun to listen to them.
BEFORE = ["trap : TERM USR2 # the script outlives its job"]
AFTER = [
    "code=$?",
    'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
    f"if [ $code -eq {128 + signal.SIGTERM} ] || [ $code -eq {128 + signal.SIGUSR2} ]; then",
    '  [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ] && scontrol requeue "$job"',
    "fi",
    "exit $code",
]


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """One job array per batch of a sweep; its settings are those of Hydra's `submitit_slurm`."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, wait for all jobs, say which did not end well. Raises UserError if SLURM takes none."""
        if all("dry_run=true" in map(str.lower, overrides) for overrides in job_overrides):
            return self._here(job_overrides, initial_job_idx)
        jobs = self._submit(job_overrides, initial_job_idx)
        array = jobs[0].job_id.partition("_")[0]
        logs = self.params["submitit_folder"].replace("%j", "*")
        print(f"slurm: job {array}, {len(jobs)} tasks; logs: {logs}", flush=True)
        try:
            return [self._end(job, overrides) for job, overrides in zip(jobs, job_overrides)]
        except KeyboardInterrupt:
            print(f"slurm: job {array} goes on; `scancel {array}` ends it", file=sys.stderr)
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> JobReturn:
        """One job, on its node."""
        import submitit

        environment = submitit.JobEnvironment()
        os.environ[LOG] = str(environment.paths.stdout)
        signal.signal(signal.SIGTERM, stop)
        if times := int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            print(f"slurm: job {environment.job_id} starts again (restart {times})", flush=True)
        return super().__call__(*args, **kwargs)

    def _here(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """In this process, one job after the other: for what takes no time."""
        launcher = BasicLauncher()
        assert self.hydra_context is not None and self.task_function is not None and self.config is not None
        launcher.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        return launcher.launch(job_overrides, initial_job_idx)

    def _submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> "list[Job[JobReturn]]":
        from hydra.core.singleton import Singleton
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise UserError(
                "hydra/launcher=slurm: this machine has no sbatch and srun; start the sweep where jobs are submitted, "
                "or take hydra/launcher=local"
            )
        if not PREFIX:  # a job may start elsewhere than in the checkout
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        settings = {**self.params, "teardown": AFTER, "setup": [*BEFORE, *(self.params["setup"] or [])]}
        executor = AutoExecutor(
            settings.pop("submitit_folder"), cluster="slurm", slurm_max_num_timeout=settings.pop("max_num_timeout")
        )
        executor.update_parameters(**{k if k in COMMON else f"slurm_{k}": v for k, v in settings.items()})
        jobs = [
            (list(overrides), "hydra.sweep.dir", i, f"job_id_for_{i}", Singleton.get_state())
            for i, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        try:
            return executor.map_array(self, *zip(*jobs))
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"hydra/launcher=slurm: {' '.join(str(error).split())}") from error

    def _end(self, job: "Job[JobReturn]", overrides: Sequence[str]) -> JobReturn:
        """Wait for a job; one that was killed has failed."""
        from submitit.core.utils import UncompletedJobError

        log = job.paths.stdout
        try:
            found: JobReturn = job.result()
        except UncompletedJobError as error:
            print(f"failed: slurm job {job.job_id} ({job.state}), log {log}: {_last_line(error)}", file=sys.stderr)
            return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=Failed(1))
        if found.status == JobStatus.FAILED:
            print(f"failed: slurm job {job.job_id}, log {log}", file=sys.stderr)
        return found


def stop(signum: int, frame: FrameType | None) -> None:
    """End this job at SIGTERM, which submitit would ignore until it is killed; the records are whole at any moment."""
    # not print: it may be what the signal has interrupted
    os.write(sys.stdout.fileno(), b"slurm: stopped by SIGTERM; finished samples are recorded\n")
    sys.exit(128 + signum)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
