"""Low-bit codes of keys and values: what is stored, packing into whole bytes, and back.

A group of `group` elements along tokens (dim 2) or along channels (dim 3) of x [B, H, n, D] has one scale and one
offset, both float16: x is about code * scale + offset with codes 0 … 2**bits - 1. Codes are packed along the same
dimension, the lowest bits first: 8, 4, 2 and 1 bits fill bytes with 1, 2, 4 and 8 codes, 3 bits put 8 codes in 3 bytes.
"""

from kernels.quantize.reference import BITS, Packed, codes_per_pack, dequantize, planes, quantize

__all__ = ["BITS", "Packed", "codes_per_pack", "dequantize", "planes", "quantize"]
