"""`attend_quantized` on a CPU with its two products in C++: codes become numbers a tile at a time, in the first cache.

Everything between the products (rules, visibility, softmax, slots in full precision) is the reference's own.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels import compiled
from kernels.attend_quantized.reference import Products
from kernels.quantize import Packed

# channels of a head that the loops are written for: whole vectors, and what their buffers hold
LANES, WIDEST = 16, 512


class _Packed(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p), ("scale", c_void_p), ("offset", c_void_p), ("codes_stride", c_int64),
        ("scale_stride", c_int64), ("offset_stride", c_int64), ("n", c_int64), ("width", c_int64), ("bits", c_int32),
        ("group", c_int32), ("dim", c_int32),
    ]  # fmt: skip


def serves(q: Tensor, keys: tuple[Packed | None, Tensor], values: tuple[Packed | None, Tensor]) -> bool:
    """Whether the loops take these codes, for these queries."""
    sides = [(packed, recent.shape[-1]) for packed, recent in (keys, values) if packed is not None]
    fit = all(
        width % LANES == 0 and width <= WIDEST and all(map(compiled.evenly_apart, packed.tensors()))
        for packed, width in sides
    )
    return fit and compiled.on_compiled(q, *(packed.codes for packed, _ in sides))


def products() -> Products:
    """The compiled forms of both products with codes, for tensors that `serves` takes."""
    return Products(dot, mix)


def dot(q: Tensor, packed: Packed, out: Tensor) -> None:
    """q·k, q [B, H, R, D] float32, into out [B, H, R, n], float32, whose rows lie equally far apart."""
    B, H, R, D = q.shape
    q = q.contiguous()
    pieces = compiled.pieces(B * H)
    _library().packed_dot(
        q.data_ptr(), B * H, R, _view(packed, D), out.data_ptr(), out.stride(2), pieces, torch.get_num_threads()
    )


def mix(p: Tensor, packed: Packed) -> Tensor:
    """p [B, H, R, n] float32, whose rows lie equally far apart, over the values: [B, H, R, Dv], float32."""
    B, H, R, _ = p.shape
    width = packed.scale.shape[-1] * (packed.group if packed.dim == 3 else 1)
    pieces = compiled.pieces(B * H)
    out = p.new_empty(pieces, B, H, R, width)
    _library().packed_mix(
        p.data_ptr(), p.stride(2), B * H, R, _view(packed, width), out.data_ptr(), pieces, torch.get_num_threads()
    )
    return out[0] if pieces == 1 else out.sum(0)


def _view(packed: Packed, width: int) -> _Packed:
    codes, scale, offset = packed.tensors()
    return _Packed(
        codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), codes.stride(1), scale.stride(1), offset.stride(1),
        len(packed), width, packed.bits, packed.group, packed.dim,
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    library = compiled.library()
    assert library is not None, "asked before"
    packed = ctypes.POINTER(_Packed)
    library.packed_dot.argtypes = [c_void_p, c_int64, c_int64, packed, c_void_p, c_int64, c_int64, c_int]
    library.packed_mix.argtypes = [c_void_p, c_int64, c_int64, c_int64, packed, c_void_p, c_int64, c_int]
    library.packed_dot.restype = library.packed_mix.restype = None
    return library
