"""Seconds of a call, and the most that the machine does per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# calls that a median is taken over at least
LEAST_CALLS = 5


@dataclass(frozen=True)
class Ceilings:
    """bytes: read and written per second by a copy of memory far larger than any cache.  flops: of a matrix product."""

    bytes: float
    flops: float

    def seconds(self, moved: float, flops: float) -> float:
        """The least that so many bytes and operations take."""
        return max(moved / self.bytes, flops / self.flops)


def seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of a call over about `budget` seconds of calls; on a GPU with its second-level cache emptied."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=min(25, 500 * budget), rep=1000 * budget, return_mode="median") / 1000
    call()
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or sum(taken) < budget:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def captured_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call inside a CUDA graph, where nothing waits for Python; what it reads may lie in the cache."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, return_mode="median") / 1000


def measure_ceilings(device: torch.device, dtype: torch.dtype, budget: float, brief: bool = False) -> Ceilings:
    """The machine's own, by PyTorch's copy and matrix product of random numbers."""
    n_bytes, n = (1 << 31, 8192) if device.type == "cuda" else (1 << 28, 1536)
    if brief:
        n_bytes, n = 1 << 24, 256
    return Ceilings(_copied(n_bytes, device, budget), _multiplied(n, device, dtype, budget))


def _copied(n_bytes: int, device: torch.device, budget: float) -> float:
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds(lambda: target.copy_(source), device, budget)


def _multiplied(n: int, device: torch.device, dtype: torch.dtype, budget: float) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, budget)
