"""Whole numbers of any width from 1 to 16 bits in whole bytes, the lowest bits first, as one stream per row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def size(n: int, bits: int) -> int:
    """Bytes of n codes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], below 2 ** bits, as uint8 [..., size(n, bits)]: code i begins at bit i * bits."""
    n, run = codes.shape[-1], math.lcm(bits, 8) // bits  # codes in the shortest stretch of whole bytes
    if bits == 8:
        return codes.to(torch.uint8)
    codes = F.pad(codes.to(torch.int32), (0, -n % run)).unflatten(-1, (-1, run))
    out = codes.new_zeros(*codes.shape[:-1], run * bits // 8)
    for i in range(run):
        byte, shift = divmod(i * bits, 8)
        word = codes[..., i] << shift
        for j in range(byte, -(-(i * bits + bits) // 8)):
            out[..., j] |= word >> 8 * (j - byte) & 255
    return out.to(torch.uint8).flatten(-2)[..., : size(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The codes [..., n] of what `pack` gave, int32."""
    if bits == 8:
        return packed.to(torch.int32)
    run = math.lcm(bits, 8) // bits
    runs = -(-n // run)
    x = F.pad(packed.to(torch.int32), (0, runs * run * bits // 8 - packed.shape[-1])).unflatten(-1, (runs, -1))
    out = x.new_empty(*x.shape[:-1], run)
    for i in range(run):
        byte, shift = divmod(i * bits, 8)
        word = sum(x[..., j] << 8 * (j - byte) for j in range(byte, -(-(i * bits + bits) // 8)))
        out[..., i] = word >> shift & (1 << bits) - 1
    return out.flatten(-2)[..., :n]
