"""A cluster of one node: munged, slurmctld and slurmd in a folder of their own, ended with the session."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
HERE = Path(__file__).parent
SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for as long as a credential lives: two minutes, or what is given here, 5 at least
AuthInfo=socket={folder}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# as long as a job of the tests may take: one that does not stop at SIGTERM would get done, and be noticed
KillWait=60
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg={true}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Two partitions: jobs of `high` preempt those of `low`, which have a minute to end."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs {', '.join(missing) or 'root, for the daemons of SLURM'}")
    # a socket's path may have a hundred characters
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{HERE / 'bin'}{os.pathsep}{os.environ['PATH']}")
        try:
            try:
                _start(folder)
            except (OSError, subprocess.SubprocessError, TimeoutError) as error:
                pytest.skip(f"SLURM does not start on this machine: {error}")
            yield
            # what a failed test has left behind, while somebody can still end it
            subprocess.run(["scancel", "--user=root"], timeout=60)
            for _ in range(100):
                if not subprocess.run(["squeue", "-h"], capture_output=True, timeout=60).stdout:
                    break
                time.sleep(0.1)
        finally:
            for daemon in ("slurmd", "slurmctld", "munged"):
                _end(folder / f"{daemon}.pid")
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> None:
    """Write the settings and start the daemons. Raises TimeoutError if they do not work after a while."""
    shown = subprocess.run(["slurmd", "-C"], capture_output=True, text=True, check=True).stdout
    memory = int(re.findall(r"RealMemory=(\d+)", shown)[0]) * 9 // 10
    controller_port, node_port = _free_ports(2)
    settings = SETTINGS.format(
        folder=folder,
        host=socket.gethostname().partition(".")[0],
        cpus=re.findall(r"CPUs=(\d+)", shown)[0],
        memory=memory,
        controller_port=controller_port,
        node_port=node_port,
        true=shutil.which("true"),
    )
    (folder / "slurm.conf").write_text(settings)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log",
             "seed-file": "munge.seed"}  # fmt: skip
    munged = ["munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
    for command in (munged, ["slurmctld", "-c"], ["slurmd", "-c"]):
        # not through a pipe: a daemon might hold it open
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        state = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%t"], capture_output=True, text=True).stdout
        if state.strip() == "idle":
            return
        time.sleep(0.1)
    raise TimeoutError(f"it did not come up: {(folder / 'slurmctld.log').read_text()[-2000:]}")


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(pid_file: Path) -> None:
    """End a daemon of ours, by force if its controller has gone before it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)
