"""Low-bit codes of keys and values: what is stored, packing into whole bytes, and back.

A group of `group` elements along tokens (dim 2) or along channels (dim 3) of x [B, H, n, D] has one scale and one
offset, both float16: x is about code * scale + offset with codes 0 … 2**bits - 1. Codes are packed along the same
dimension, the lowest bits first: 8, 4, 2 and 1 bits fill bytes with 1, 2, 4 and 8 codes, 3 bits put 8 codes in 3 bytes.
"""

import torch
from torch import Tensor

from kernels.backend import on_triton
from kernels.quantize import reference
from kernels.quantize.reference import BITS, Packed, codes_per_pack, planes


def quantize(x: Tensor, bits: int, group: int, dim: int, zero: str = "float") -> Packed:
    """x [B, H, n, D] as codes, rounded to the nearest, halves to even.

    dim: 2 for groups of tokens of one channel, 3 for groups of channels of one token; `group` divides its length and
    is a multiple of codes_per_pack(bits). zero: "float" puts a group's minimum on the grid; "int" takes the grid of
    multiples of the scale. Offsets and scales beyond float16 are cut to its largest number.
    """
    if on_triton(x):
        from kernels.quantize import triton

        return triton.quantize(x, bits, group, dim, zero)
    return reference.quantize(x, bits, group, dim, zero)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes stand for, [B, H, n, D]."""
    if on_triton(packed.scale, packed.codes):
        from kernels.quantize import triton

        return triton.dequantize(packed, dtype)
    return reference.dequantize(packed, dtype)


__all__ = ["BITS", "Packed", "codes_per_pack", "dequantize", "planes", "quantize"]
