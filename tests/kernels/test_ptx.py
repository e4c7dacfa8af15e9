"""Every Triton kernel compiles for GPUs that are not here, and fits into them.

In processes of their own: Triton decides whether it interprets when it is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))


def ahead(*words: str) -> subprocess.CompletedProcess:
    """`python -m kernels.aot`, for machines without a GPU."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def starts_kernels(op: str) -> bool:
    """Whether the op has kernels of its own, not only parts of other ops' kernels."""
    return "launch(" in (ROOT / "kernels" / op / "triton.py").read_text()


@pytest.mark.timeout(900)  # the compiler alone takes half a minute of an idle core
def test_a_kernel_of_each_kind_compiles_for_ampere_and_hopper_within_shared_memory():
    started = [op for op in OPS if starts_kernels(op)]
    done = ahead("--brief", *started)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in started:  # one line per kernel, with the shared memory that both targets need
        assert re.search(rf"^{op} \w+ .*: shared \[\d+, \d+\]", done.stdout, re.M), op


@pytest.mark.slow
@pytest.mark.timeout(3600)  # quantize alone takes 25 minutes on a busy core, all ops 42
@pytest.mark.parametrize("op", [op for op in OPS if starts_kernels(op)])
def test_every_variant_compiles_for_ampere_and_hopper_within_shared_memory(op):
    done = ahead(op)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_fit_is_reported(monkeypatch, capsys):
    from kernels import aot as module

    shared = SimpleNamespace(shared=module.SHARED_LIMIT + 1)
    made = SimpleNamespace(asm={"ptx": "text", "cubin": b"code"}, metadata=shared)
    monkeypatch.setattr(module, "variants", lambda op, brief: [SimpleNamespace(name="kernel")])
    monkeypatch.setattr(module, "compiled", lambda variant, capability: made)
    assert module.main(["attend"]) == 1
    assert f"sm_90: {module.SHARED_LIMIT + 1} bytes of shared memory" in capsys.readouterr().out


def test_what_does_not_compile_is_reported(monkeypatch, capsys):
    from kernels import aot as module

    def compiled(variant, capability):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(module, "variants", lambda op, brief: [SimpleNamespace(name="kernel")])
    monkeypatch.setattr(module, "compiled", compiled)
    assert module.main(["attend"]) == 1
    assert "sm_80: RuntimeError: no such instruction" in capsys.readouterr().out
