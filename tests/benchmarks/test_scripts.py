"""The scripts of benchmarks/ as files, which their folder on Python's path must not trip: it holds a kernels.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["kernels", "speed"])
def test_a_script_that_imports_transformers_runs_as_a_file(script):
    command = [sys.executable, f"benchmarks/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--threads" in done.stdout, done.stderr
