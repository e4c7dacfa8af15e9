"""Which form of the ops runs: the definition in PyTorch, or a fast form: Triton on a GPU, C++ on a CPU."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

#: auto: Triton for tensors on a GPU that it works on, C++ on a CPU where it can be built, else the reference.
BACKENDS = ("auto", "reference", "triton")

# what the kernels are written for and compiled for in the tests: Ampere and later, and these element types
LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_chosen = "auto"


def use(backend: str) -> None:
    """Choose for the whole process. Raises ValueError for a name that is none of BACKENDS."""
    global _chosen
    if backend not in BACKENDS:
        raise ValueError(f"kernels.backend={backend}: give one of {', '.join(BACKENDS)}")
    _chosen = backend


def chosen() -> str:
    """What `use` was given last."""
    return _chosen


def on_triton(*tensors: Tensor) -> bool:
    """Whether an op over these tensors, all on one device, runs in Triton.

    Never where a gradient is wanted, which only the reference has, nor for other element types than DTYPES.
    Raises RuntimeError where Triton was asked for and cannot run.
    """
    if _chosen == "reference":
        return False
    first = tensors[0]
    if not first.is_cuda and _chosen == "auto":
        return False
    if any(x.is_floating_point() and x.dtype not in DTYPES for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return runs_on(first.device)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which works on a CPU and is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether Triton works on a device. Raises RuntimeError where it was asked for and cannot run."""
    trouble = _trouble(device, interpreted())
    if trouble and _chosen == "triton":
        raise RuntimeError(f"kernels.backend=triton: {trouble}; kernels.backend=reference works everywhere")
    return trouble is None


@cache
def _trouble(device: torch.device, interpreted: bool) -> str | None:
    """Why Triton cannot run on the device, or None."""
    try:
        import triton
    except Exception as error:  # a broken installation fails in its own way
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, not on {device.type} (TRITON_INTERPRET=1 interprets them, for tests)"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        triton.runtime.driver.active.get_current_device()  # builds its launcher, which takes a C compiler
    except Exception as error:
        return f"it cannot start here ({type(error).__name__}: {error})"
    return None
