"""`quantize` and `dequantize` in Triton: a tile of whole groups is read once and written once.

Groups of one head are counted as lanes: with groups along tokens, lane = group of tokens * D + channel; with groups
along channels, lane = token * (D / group) + group of channels. Both count in the order in which scales are stored, so
one kernel serves both with other strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.quantize.reference import BITS, Packed, codes_per_pack

# elements of one program's tile
TILE = 4096


@triton.jit
def _round_half_even(x):
    """Nearest whole number of a float32, as torch.round gives it."""
    # a float32 of 2**23 and more is whole; adding 2**23 to a smaller one rounds it to whole numbers
    whole = (tl.abs(x) + 8388608.0) - 8388608.0
    return tl.where(tl.abs(x) < 8388608.0, tl.where(x < 0, -whole, whole), x)


@triton.jit
def quantize_kernel(
    X, CODES, SCALE, OFFSET, n_lanes, H, x_sb, x_sh, x_so, x_si, x_sj, codes_sh,
    BITS: tl.constexpr, PER_PACK: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr,
    CODES_OUTER: tl.constexpr, CODES_INNER: tl.constexpr, CODES_BYTE: tl.constexpr, THROUGH_ZERO: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """LANES groups of one row and head. PADDED: GROUP rounded up to a power of two."""
    head = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < n_lanes
    outer, inner = (lane // INNER).to(tl.int64), lane % INNER
    j = tl.arange(0, PADDED)
    in_group = (j < GROUP)[None, :]
    at = (outer * x_so + inner * x_si)[:, None] + j[None, :] * x_sj
    X += head // H * x_sb + head % H * x_sh
    x = tl.load(X + at, mask=live[:, None] & in_group, other=0.0).to(tl.float32)  # [LANES, PADDED]
    low = tl.min(tl.where(in_group, x, float("inf")), 1)
    high = tl.max(tl.where(in_group, x, -float("inf")), 1)

    TOP: tl.constexpr = 2**BITS - 1
    span = high - low
    if THROUGH_ZERO:
        span = tl.maximum(span, 1e-5)
    scale = tl.minimum(tl.math.div_rn(span, TOP * 1.0), 65504.0).to(tl.float16)
    scale = tl.where(scale == 0.0, 1.0, scale).to(tl.float16)
    step = scale.to(tl.float32)
    if THROUGH_ZERO:
        first = _round_half_even(tl.math.div_rn(low, step))
        offset = tl.minimum(tl.maximum(first * step, -65504.0), 65504.0).to(tl.float16)
        code = tl.math.div_rn(x, tl.broadcast_to(step[:, None], x.shape)) - first[:, None]
    else:
        offset = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
        code = tl.math.div_rn(x - offset.to(tl.float32)[:, None], tl.broadcast_to(step[:, None], x.shape))
    code = tl.minimum(tl.maximum(_round_half_even(code), 0.0), TOP * 1.0).to(tl.int32)

    heads_lanes = head * n_lanes + lane
    tl.store(SCALE + heads_lanes, scale, mask=live)
    tl.store(OFFSET + heads_lanes, offset, mask=live)

    PACKS: tl.constexpr = PADDED // PER_PACK
    shift = BITS * tl.arange(0, PER_PACK)
    word = tl.sum(tl.reshape(code, (LANES, PACKS, PER_PACK)) << shift[None, None, :], 2)  # [LANES, PACKS]
    pack = tl.arange(0, PACKS)
    BYTES: tl.constexpr = PER_PACK * BITS // 8
    at = (outer * CODES_OUTER + inner * CODES_INNER)[:, None] + pack[None, :] * (BYTES * CODES_BYTE)
    stored = live[:, None] & (pack < GROUP // PER_PACK)[None, :]
    CODES += head * codes_sh
    for byte in tl.static_range(BYTES):
        tl.store(CODES + at + byte * CODES_BYTE, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=stored)


@triton.jit
def dequantize_kernel(
    CODES, SCALE, OFFSET, X, n_lanes, H, codes_sb, codes_sh, scale_sb, scale_sh, x_sh,
    BITS: tl.constexpr, PER_PACK: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr,
    CODES_OUTER: tl.constexpr, CODES_INNER: tl.constexpr, CODES_BYTE: tl.constexpr, X_OUTER: tl.constexpr,
    X_INNER: tl.constexpr, X_J: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES groups of one row and head."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < n_lanes
    outer, inner = (lane // INNER).to(tl.int64), lane % INNER
    scale = tl.load(SCALE + b * scale_sb + h * scale_sh + lane, mask=live, other=0.0).to(tl.float32)
    offset = tl.load(OFFSET + b * scale_sb + h * scale_sh + lane, mask=live, other=0.0).to(tl.float32)

    PACKS: tl.constexpr = PADDED // PER_PACK
    BYTES: tl.constexpr = PER_PACK * BITS // 8
    pack = tl.arange(0, PACKS)
    at = (outer * CODES_OUTER + inner * CODES_INNER)[:, None] + pack[None, :] * (BYTES * CODES_BYTE)
    stored = live[:, None] & (pack < GROUP // PER_PACK)[None, :]
    CODES += b * codes_sb + h * codes_sh
    word = tl.load(CODES + at, mask=stored, other=0).to(tl.int32)  # [LANES, PACKS]
    for byte in tl.static_range(1, BYTES):
        word |= tl.load(CODES + at + byte * CODES_BYTE, mask=stored, other=0).to(tl.int32) << (8 * byte)
    shift = BITS * tl.arange(0, PER_PACK)
    code = tl.reshape((word[:, :, None] >> shift[None, None, :]) & (2**BITS - 1), (LANES, PADDED))
    x = code.to(tl.float32) * scale[:, None] + offset[:, None]

    j = tl.arange(0, PADDED)
    at = head * x_sh + (outer * X_OUTER + inner * X_INNER)[:, None] + j[None, :] * X_J
    tl.store(X + at, x.to(X.dtype.element_ty), mask=live[:, None] & (j < GROUP)[None, :])


def quantize(x: Tensor, bits: int, group: int, dim: int, zero: str) -> Packed:
    """As the reference, bit for bit."""
    B, H, n, D = x.shape
    assert x.shape[dim] % group == 0 and group % codes_per_pack(bits) == 0, "codes and groups fill whole bytes"
    codes_shape = (n * bits // 8, D) if dim == 2 else (n, D * bits // 8)
    groups_shape = (n // group, D) if dim == 2 else (n, D // group)
    codes = x.new_empty(B, H, *codes_shape, dtype=torch.uint8)
    scale = x.new_empty(B, H, *groups_shape, dtype=torch.float16)
    offset = torch.empty_like(scale)
    x_sb, x_sh, x_sn, x_sd = x.stride()
    x_at = (group * x_sn, x_sd, x_sn) if dim == 2 else (x_sn, group * x_sd, x_sd)
    shape = _shape(bits, group, dim, D)
    n_lanes = groups_shape[0] * groups_shape[1]
    if codes.numel():
        launch(
            quantize_kernel, (triton.cdiv(n_lanes, shape["LANES"]), B * H),
            x, codes, scale, offset, n_lanes, H, x_sb, x_sh, *x_at, codes_shape[0] * codes_shape[1],
            THROUGH_ZERO=zero == "int", **shape,
        )  # fmt: skip
    return Packed(codes, scale, offset, bits, group, dim)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """As the reference, but for the rounding of code * scale before the offset is added."""
    B, H, _, last = packed.codes.shape
    bits, group, dim = packed.bits, packed.group, packed.dim
    n, D = len(packed), last if dim == 2 else last * 8 // bits
    x = packed.codes.new_empty(B, H, n, D, dtype=dtype)
    codes, scale, offset = dense(packed)
    shape = _shape(bits, group, dim, D)
    n_lanes = scale.shape[2] * scale.shape[3]
    if x.numel():
        x_at = (group * D, 1, D) if dim == 2 else (D, group, 1)
        launch(
            dequantize_kernel, (triton.cdiv(n_lanes, shape["LANES"]), B * H),
            codes, scale, offset, x, n_lanes, H, *codes.stride()[:2], *scale.stride()[:2], n * D,
            X_OUTER=x_at[0], X_INNER=x_at[1], X_J=x_at[2], **shape,
        )  # fmt: skip
    return x


def dense(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset with heads in one piece, the last two with equal strides; copies only if need be."""
    codes, scale, offset = (
        x if x[0, 0].is_contiguous() else x.contiguous() for x in (packed.codes, packed.scale, packed.offset)
    )
    if scale.stride() != offset.stride():
        scale, offset = scale.contiguous(), offset.contiguous()
    return codes, scale, offset


def _shape(bits: int, group: int, dim: int, D: int) -> dict[str, int]:
    """The constants that both kernels share."""
    padded = triton.next_power_of_2(group)
    of_group = group * bits // 8  # bytes of one group's codes
    outer, inner, byte = (of_group * D, 1, D) if dim == 2 else (D * bits // 8, of_group, 1)
    return {
        "BITS": bits, "PER_PACK": codes_per_pack(bits), "GROUP": group, "PADDED": padded,
        "INNER": D if dim == 2 else D // group, "CODES_OUTER": outer, "CODES_INNER": inner, "CODES_BYTE": byte,
        "LANES": max(1, TILE // padded),
    }  # fmt: skip


def compile_cases(brief: bool = False) -> None:
    """Call what is here for types, code widths and directions; brief: for one of each."""
    for bits in (4,) if brief else BITS:
        for dim in (2, 3):
            for dtype in (torch.bfloat16,) if brief else (torch.bfloat16, torch.float16, torch.float32):
                for zero in ("float",) if brief else ("float", "int"):
                    packed = quantize(torch.empty(1, 1, 64, 128, dtype=dtype), bits, 32, dim, zero)
                dequantize(packed, dtype)
