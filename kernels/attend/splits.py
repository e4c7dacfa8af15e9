"""Slots in parts that run side by side, where few queries would leave most of a GPU idle; and their merging.

Paper: Dao et al. 2023, Flash-Decoding: every part ends with its output and log-sum-exp, and those are merged.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch

# slots of one split are worth a program of their own from here on
LEAST_SPLIT = 256
# programs per multiprocessor that hide each other's waits while decoding
PER_PROCESSOR = 2


@triton.jit
def merge(
    PART, PART_LSE, OUT, LSE, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Program r: row r of [B, Hq, T] from its splits' outputs and log-sum-exps."""
    r = tl.program_id(0).to(tl.int64)
    s, dv = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)
    lse = tl.load(PART_LSE + r * splits + s, mask=s < splits, other=-float("inf"))
    biggest = tl.max(lse)
    base = tl.where(biggest == -float("inf"), 0.0, biggest)
    weight = tl.exp(lse - base)
    total = tl.sum(weight)
    safe = tl.where(total == 0.0, 1.0, total)
    if OUT is not None:
        at = PART + (r * splits + s)[:, None] * DV + dv[None, :]
        part = tl.load(at, mask=(s < splits)[:, None] & (dv < DV)[None, :], other=0.0)
        out = tl.sum(part * weight[:, None], 0) / safe
        tl.store(OUT + r * DV + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
    if LSE is not None:
        tl.store(LSE + r, tl.where(total == 0.0, -float("inf"), base + tl.log(safe)))


def merged(
    part: Tensor | None, part_lse: Tensor, out: Tensor | None, lse: Tensor | None, splits: int, rows: int, DV: int
) -> None:
    """Outputs [rows, splits, DV] and log-sum-exps [rows, splits] of the splits into those of all slots."""
    sizes = {"DV": DV, "BLOCK_DV": triton.next_power_of_2(DV), "BLOCK_SPLITS": triton.next_power_of_2(splits)}
    launch(merge, (rows,), part, part_lse, out, lse, splits, **sizes, num_warps=4)


def pick_splits(device: torch.device, programs: int, S: int) -> int:
    """Parts of S slots, so that `programs` programs of one part each fill the device."""
    wanted = PER_PROCESSOR * processors(device) // max(1, programs)
    return max(1, min(wanted, S // LEAST_SPLIT, 128))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
