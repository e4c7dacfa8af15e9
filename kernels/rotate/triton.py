"""`rotate` in Triton: one pass in place of the definition's eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.tiles import strides
from kernels.backend import DTYPES
from kernels.launch import launch

# elements of one program's tile
TILE = 2048


@triton.jit
def rotated(
    X, COS, SIN, OUT, x_sb, x_sh, x_st, x_sd, c_sb, c_sh, c_st, c_sd, s_sb, s_sh, s_st, s_sd, H, T,
    D: tl.constexpr, HALF: tl.constexpr, NEXT: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS vectors of one row of the batch. Pair i is channels i * NEXT and i * NEXT + APART; REST: to be copied."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, t = (row // T).to(tl.int64), row % T
    i = tl.arange(0, PAIRS)
    real = (row < H * T)[:, None] & (i < HALF)[None, :]
    cos = tl.load(COS + b * c_sb + (h * c_sh + t * c_st)[:, None] + i[None, :] * c_sd, mask=real, other=0.0)
    sin = tl.load(SIN + b * s_sb + (h * s_sh + t * s_st)[:, None] + i[None, :] * s_sd, mask=real, other=0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    at = X + b * x_sb + (h * x_sh + t * x_st)[:, None]
    to = OUT + ((b * H * T + row) * D)[:, None]
    x = tl.load(at + (i * NEXT)[None, :] * x_sd, mask=real, other=0.0).to(tl.float32)
    y = tl.load(at + (i * NEXT + APART)[None, :] * x_sd, mask=real, other=0.0).to(tl.float32)
    tl.store(to + (i * NEXT)[None, :], (x * cos - y * sin).to(OUT.dtype.element_ty), mask=real)
    tl.store(to + (i * NEXT + APART)[None, :], (y * cos + x * sin).to(OUT.dtype.element_ty), mask=real)
    if REST > 0:
        d = 2 * HALF + tl.arange(0, REST)
        real = (row < H * T)[:, None] & (d < D)[None, :]
        tl.store(to + d[None, :], tl.load(at + d[None, :] * x_sd, mask=real), mask=real)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What `kernels.rotate` gives."""
    B, H, T, D = x.shape
    half = cos.shape[-1]
    out = x.new_empty(B, H, T, D)
    pairs, rest = triton.next_power_of_2(half), D - 2 * half
    rows = min(triton.next_power_of_2(H * T), max(1, TILE // pairs))
    launch(
        rotated, (triton.cdiv(H * T, rows), B),
        x, cos, sin, out, *x.stride(), *strides(cos, 4), *strides(sin, 4), H, T,
        D=D, HALF=half, NEXT=2 if interleaved else 1, APART=1 if interleaved else half, ROWS=rows, PAIRS=pairs,
        REST=triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
    return out


def compile_cases(brief: bool = False) -> None:
    """Call what is here for types, widths and pairings; brief: for one."""
    for dtype in (torch.bfloat16,) if brief else DTYPES:
        for D, R in ((128, 128),) if brief else ((128, 128), (80, 32), (256, 256)):
            x, angle = torch.empty(1, 8, 4, D, dtype=dtype), torch.empty(1, 8, 4, R // 2)
            for interleaved in (False,) if brief else (False, True):
                rotate(x, angle, angle, interleaved)
