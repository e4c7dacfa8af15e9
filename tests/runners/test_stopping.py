"""Signals: said once, whatever is pressed and how often, with an exit code that tells which."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# a process that works until it is stopped, and says so as run.py does
WORK = """
import signal, sys, time
from runners import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs behind it are started to ignore it
stopping.listen()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("stopped", file=sys.stderr)
    time.sleep(float(sys.argv[1]))
sys.exit(stopping.code())
"""


def started(after: float = 0) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(after)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_every_signal_is_said_in_one_line_and_has_its_exit_code(number, code):
    process = started()
    process.send_signal(getattr(signal, number))
    assert process.communicate(timeout=60)[1] == "stopped\n" and process.returncode == code


def test_a_key_that_is_pressed_twice_prints_no_traceback():
    process = started()
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "stopped\n" and process.returncode == 130


def test_a_second_signal_after_a_moment_does_not_wait():
    process = started(after=60)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "stopped\nstopped at once\n" and process.returncode == 143


def test_a_process_that_was_started_to_outlive_its_terminal_does():
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", WORK, "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    worker = (
        "import os, time\nfrom pathlib import Path\nfrom runners.stopping import end_with\n"
        f"end_with(os.getppid())\nPath({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {worker!r}])\n"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    limit = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < limit
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while alive(pid):
        assert time.monotonic() < limit
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # one that nobody has asked for its exit code is still listed
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]


def test_a_sweep_whose_only_worker_is_the_process_itself_goes_on():
    # one GPU or n_jobs=1: joblib starts no other process
    code = "import os, time; from runners.stopping import end_with; end_with(os.getpid()); time.sleep(1.2); print('on')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "on\n")
