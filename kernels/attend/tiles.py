"""What kernels that go over slots in tiles share: a tile's logits, what a row ends with, and how large a tile is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreted
from kernels.noise import Stem
from kernels.noise.triton import log_uniform

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# shared memory for the tiles of keys and values in flight; a block may have 99 KiB on the smallest of the GPUs
TILE_BYTES = 64 * 1024
# slots whose positions are looked at together to find those that a tile needs
SCAN = tl.constexpr(1024)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b in float32; UPCAST: the interpreter multiplies no bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """Hyperbolic tangent from the one function of exponents that every backend has."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def scores(
    x, q_at, k_at, slope, start, tau, scale, cap, window,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, SLOPE: tl.constexpr,
    NOISE: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Products q·k as logits to the base 2, -inf where nothing is seen; all but x broadcast to its shape.

    q_at, k_at: positions or indices.  start: of the noise.
    """
    distance = q_at - k_at
    if CAP:
        x = tanh(x * (scale / cap)) * cap
    else:
        x = x * scale
    if SLOPE:
        x -= slope * distance.to(tl.float32)
    if NOISE:
        x -= tl.log(-log_uniform(start, k_at))
    if TAU:
        x = x / tau
    x = x * LOG2E
    if CAUSAL:
        x = tl.where(distance >= 0, x, -float("inf"))
    if POSITIONS:
        x = tl.where(k_at >= 0, x, -float("inf"))
    if WINDOW:
        x = tl.where(distance < window, x, -float("inf"))
    return x


@triton.jit
def seen_range(POS, lo, hi, first, last, window, WINDOW: tl.constexpr):
    """From the first slot of [lo, hi) that a query in [first, last] sees to behind the last one; empty: (hi, lo)."""
    low, high = hi, lo
    for j in range(lo, hi, SCAN):
        at = j + tl.arange(0, SCAN)
        pos = tl.load(POS + at, mask=at < hi, other=-1)
        seen = (pos >= 0) & (pos <= last)
        if WINDOW:
            seen &= pos > first - window
        low = tl.minimum(low, tl.min(tl.where(seen, at, hi)))
        high = tl.maximum(high, tl.max(tl.where(seen, at + 1, lo)))
    return low, high


@triton.jit
def finish(acc, biggest, total, OUT, LSE, row, dv, real, DV: tl.constexpr):
    """Store output rows and their log-sum-exp, to the base e; rows that saw nothing give 0 and -inf."""
    nothing = total == 0.0
    if OUT is not None:
        out = acc / tl.where(nothing, 1.0, total)[:, None]
        where = OUT + row.to(tl.int64)[:, None] * DV + dv[None, :]
        tl.store(where, out.to(OUT.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    if LSE is not None:
        lse = tl.where(nothing, -float("inf"), biggest * LN2 + tl.log(tl.where(nothing, 1.0, total)))
        tl.store(LSE + row, lse, mask=real)


def tiles(rows: int, D: int, DV: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a tile, warps and stages: as large as registers and TILE_BYTES of shared memory allow."""
    width, size = triton.next_power_of_2(max(16, D)), dtype.itemsize
    wide = triton.next_power_of_2(max(16, DV))
    most = {2: 128 if max(width, wide) <= 128 else 64, 4: 32 if max(width, wide) <= 128 else 16}[size]
    M = min(most, max(16, triton.next_power_of_2(rows)))
    N = min(128, max(16, TILE_BYTES // (2 * size * (width + wide))))
    if size == 4:
        N = min(N, 32)
    # few rows leave registers and shared memory for one more stage, and decoding waits for memory alone
    launched = {"num_warps": 8 if M > 64 else 4, "num_stages": 3 if M == 16 else 2}
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_D": width, "BLOCK_DV": wide, **launched}


def upcast(x: Tensor) -> bool:
    """Whether products need float32 operands: the interpreter's of bfloat16 are wrong."""
    return interpreted() and x.dtype == torch.bfloat16


def start_of(stem: Stem, B: int, Hq: int) -> Tensor:
    """What a slot's key is added to before the last mixing, [B, Hq, T or 1], int32."""
    return stem.start().view(B, Hq, -1)


def packed_rows(x: Tensor) -> Tensor:
    """x with its last dimension in one piece, as it always lies in a cache."""
    return x if x.stride(-1) == 1 else x.contiguous()


def last_contiguous(pos: Tensor) -> Tensor:
    """Positions [B, H or 1, S] in one piece along the slots."""
    return pos if pos.stride(-1) == 1 or pos.shape[-1] == 1 else pos.contiguous()


def strides(x: Tensor | None, n: int) -> tuple[int, ...]:
    """The strides of the first n dimensions, 0 where one element stands for all or there is no tensor."""
    return (0,) * n if x is None else tuple(0 if x.shape[i] == 1 else x.stride(i) for i in range(n))
