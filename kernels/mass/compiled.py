"""`attend_with_mass` of one token on a CPU in C++: its attention is its mass, and nothing is computed twice."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import compiled

if TYPE_CHECKING:
    from kernels.attend.rules import Rules

# channels of a head come in whole vectors
LANES = 16


class _Rectangle(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("out", c_void_p), ("probs", c_void_p), ("rows", c_int64),
        ("group", c_int64), ("slots", c_int64), ("width", c_int64), ("value_width", c_int64), ("k_stride", c_int64),
        ("v_stride", c_int64), ("pieces", c_int64), ("scale", c_float), ("threads", c_int32), ("kind", c_int32),
    ]  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor, rules: Rules, n: int, layout: str) -> bool:
    """Whether the loops take this step: one token that sees all slots, and whose own mass is asked for."""
    return (
        q.shape[2] == n == 1
        and layout == "tail"
        and rules.plain
        and rules.window is None
        and compiled.fits(q, k, v)
        and all(x.shape[-1] % LANES == 0 and compiled.evenly_apart(x) for x in (k, v))
        and compiled.on_compiled(q, k, v)
    )


def attend_with_mass(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, 1, Dv] and attention [B, Hq, S] of q [B, Hq, 1, D]."""
    B, Hq, _, D = q.shape
    H, S = k.shape[1], k.shape[2]
    q = q.contiguous()
    out, probs = q.new_empty(B, Hq, 1, v.shape[-1]), q.new_empty(B, Hq, S)
    pointers = [x.data_ptr() for x in (q, k, v, out, probs)]
    sizes = B * H, Hq // H, S, D, v.shape[-1], k.stride(1), v.stride(1), compiled.pieces(B * H)
    kind = compiled.KINDS[k.dtype]
    _library().attend_with_probs(_Rectangle(*pointers, *sizes, rules.scale, torch.get_num_threads(), kind))
    return out, probs


@cache
def _library() -> ctypes.CDLL:
    library = compiled.library()
    assert library is not None, "asked before"
    library.attend_with_probs.argtypes, library.attend_with_probs.restype = [ctypes.POINTER(_Rectangle)], None
    return library
