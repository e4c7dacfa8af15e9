"""C++ forms of hot loops on a CPU: built once by the machine's own compiler, kept, and called on tensors' memory.

PyTorch stays the definition: it runs where there is no compiler, where building fails (one warning says why), for
tensors that the loops are not written for, and under kernels.backend=reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import backend

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*/*.cpp"))
# sums may be taken in any order, as PyTorch's are; infinities keep their meaning
FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -fPIC"
BUILD_SECONDS = 300
#: what slots may be made of, and its number in lanes.h
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def on_compiled(*tensors: Tensor) -> bool:
    """Whether an op over these tensors runs in C++, should it have a form for them: on a CPU, without gradients."""
    if backend.chosen() != "auto" or any(x.device.type != "cpu" for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return library() is not None


def fits(q: Tensor, *slots: Tensor) -> bool:
    """Whether the loops take numbers of these types: queries in float32, slots in any of KINDS, all in the same one."""
    return q.dtype == torch.float32 and slots[0].dtype in KINDS and all(x.dtype == slots[0].dtype for x in slots)


def evenly_apart(x: Tensor) -> bool:
    """Whether the heads of all rows of x [B, H, n, m] lie equally far apart, each of them without gaps."""
    apart, row, element = x.stride()[1:]
    return (len(x) == 1 or x.stride(0) == x.shape[1] * apart) and (row, element) == (x.shape[3], 1)


def pieces(heads: int) -> int:
    """Into how many pieces each head's slots are cut, so that every thread has work."""
    threads = torch.get_num_threads()
    return 1 if heads % threads == 0 else -(-4 * threads // heads)


def name_on(device: torch.device) -> str:
    """What a record says of ops on this device: reference, compiled (C++ on a CPU), triton, or triton (interpreted).

    Builds the C++ forms if they have not been yet. Raises RuntimeError where Triton was asked for and cannot run.
    """
    if backend.chosen() == "auto" and device.type == "cpu":
        return "reference" if library() is None else "compiled"
    chosen = backend.chosen()
    if chosen == "reference" or (chosen == "auto" and device.type != "cuda") or not backend.runs_on(device):
        return "reference"
    return "triton (interpreted)" if backend.interpreted() else "triton"


@cache
def library() -> ctypes.CDLL | None:
    """All C++ forms, built if they have not been yet; None: they cannot be."""
    compiler = _compiler()
    if compiler is None or not SOURCES:  # an installation of Python files alone has no sources
        return None
    try:
        folder = _folder()
        path = folder / f"kernels-{_key(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        warnings.warn(f"kernels run in PyTorch, their C++ forms cannot be built: {reason}", stacklevel=2)
        return None


def _compiler() -> list[str] | None:
    """The C++ compiler's command: the environment's CXX, or the first that is found."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    return None


def _folder() -> Path:
    """Where built libraries are kept: the user's own cache, or a folder that ends with the process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary()


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="kvfrontier-"))


def _key(compiler: list[str]) -> str:
    """What a built library is for: sources, flags, compiler and processor, as homes are shared between machines."""
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    parts = [source.read_bytes() for source in [HERE / "lanes.h", *SOURCES]]
    parts += [FLAGS.encode(), " ".join(compiler).encode(), str((program, program.stat().st_mtime_ns)).encode()]
    return hashlib.sha256(b"\0".join([*parts, _processor().encode()])).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = {
        line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")
    }
    return "\n".join([platform.machine(), platform.processor(), *sorted(named)])


def _build(compiler: list[str], path: Path) -> None:
    """Compile to a file of its own, then move it there: another process may be doing the same."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        # without OpenMP (Apple's compiler has none) the loops run on one thread
        for threads in (["-fopenmp"], []):
            command = [*compiler, *FLAGS.split(), *threads, "-shared", *map(str, SOURCES), "-o", temporary]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if done.returncode == 0:
                os.replace(temporary, path)
                return
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{compiler[0]}: {errors[0] if errors else done.stderr.strip() or 'failed'}")
    finally:
        Path(temporary).unlink(missing_ok=True)
