"""`attend_pages` on a CPU in C++: slots are read where they lie, one pass over keys and one over values."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import compiled

if TYPE_CHECKING:
    from kernels.attend.pages import Pages
    from kernels.attend.rules import Rules

# channels of a head come in whole vectors
LANES = 16


class _Pages(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("pos", c_void_p), ("at", c_void_p), ("first", c_void_p),
        ("held", c_void_p), ("tail_k", c_void_p), ("tail_v", c_void_p), ("tail_pos", c_void_p), ("q_pos", c_void_p),
        ("out", c_void_p), ("mass", c_void_p), ("bias", c_void_p), ("factor", c_void_p), ("tail_bias", c_void_p),
        ("tail_factor", c_void_p), ("rows", c_int64), ("heads", c_int64), ("group", c_int64),
        ("width", c_int64), ("value_width", c_int64), ("most", c_int64), ("tail", c_int64), ("tail_k_stride", c_int64),
        ("tail_v_stride", c_int64), ("tail_pos_batch", c_int64), ("tail_pos_head", c_int64), ("window", c_int64),
        ("scale", c_float), ("threads", c_int32), ("kind", c_int32),
    ]  # fmt: skip


def serves(q: Tensor, pages: Pages, tail: tuple[Tensor, Tensor, Tensor], rules: Rules) -> bool:
    """Whether the loops take these slots and rules; layouts as in `attend_pages`."""
    k, v = pages.k, pages.v
    return (
        rules.plain
        and compiled.fits(q, k, v, *tail[:2])
        and all(x.shape[-1] % LANES == 0 for x in (k, v))
        and all(x.is_contiguous() for x in (k, v, pages.pos, pages.at, pages.first, pages.held))
        and all(compiled.evenly_apart(x) for x in tail[:2])
        and pages.pos.dtype == pages.at.dtype == tail[2].dtype == torch.int32
        and pages.first.dtype == pages.held.dtype == torch.int64
        and tail[2].stride(2) == 1
        and compiled.on_compiled(q, k, v)
    )


def attend_pages(
    q: Tensor,
    pages: Pages,
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    q_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `kernels.attend.attend_pages_with_mass` gives."""
    k_tail, v_tail, tail_pos = tail
    B, Hq, _, D = q.shape
    H, t, width = k_tail.shape[1], k_tail.shape[2], pages.v.shape[-1]
    q, q_pos = q.contiguous(), q_pos.to(torch.int32).contiguous()
    out, mass = q.new_empty(B, Hq, 1, width), q.new_empty(B, Hq, pages.most + t)
    places = pages.k, pages.v, pages.pos, pages.at, pages.first, pages.held
    # what slots weigh, those in pages and those behind them
    bias, factor = (None if x is None else x.float().expand(B, H, t).contiguous() for x in (bias, factor))
    weights = pages.bias, pages.factor, bias, factor
    given = q, *places, k_tail, v_tail, tail_pos, q_pos, out, mass, *weights
    pointers = [None if x is None else x.data_ptr() for x in given]
    sizes = B * H, H, Hq // H, D, width, pages.most, t
    strides = k_tail.stride(1), v_tail.stride(1), tail_pos.stride(0), tail_pos.stride(1)
    how = rules.window or 0, rules.scale, torch.get_num_threads(), compiled.KINDS[pages.k.dtype]
    _library().attend_pages(_Pages(*pointers, *sizes, *strides, *how))
    return out, mass


@cache
def _library() -> ctypes.CDLL:
    library = compiled.library()
    assert library is not None, "asked before"
    library.attend_pages.argtypes, library.attend_pages.restype = [ctypes.POINTER(_Pages)], None
    return library
