"""`lowest` and `put` on a CPU in C++: one pass over the scores instead of a dozen, and no index that is made first."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels import compiled


def serves(scores: Tensor, pos: Tensor) -> bool:
    """Whether the loop takes these scores and positions."""
    return (
        scores.dtype == torch.float32
        and pos.dtype == torch.int32
        and scores.stride(-1) == pos.stride(-1) == 1
        and compiled.on_compiled(scores, pos)
    )


def lowest(scores: Tensor, pos: Tensor) -> tuple[Tensor, bool]:
    """What `kernels.select.lowest` gives."""
    B, H, S = scores.shape
    slot = torch.empty(B, H, dtype=torch.long)
    where = scores.data_ptr(), *scores.stride()[:2], pos.data_ptr(), *pos.stride()[:2]
    return slot, bool(_library().lowest(*where, B, H, S, slot.data_ptr()))


def puts(buffer: Tensor, slot: Tensor) -> bool:
    """Whether the copy takes this buffer and these slots."""
    return buffer.is_contiguous() and slot.is_contiguous() and compiled.on_compiled(buffer, slot)


def put(buffer: Tensor, slot: Tensor, value: Tensor) -> None:
    """What `kernels.select.put` does."""
    value = value.to(buffer.dtype).contiguous()
    B, H, places = buffer.shape[:3]
    size = value.nbytes // (B * H)
    _library().put(buffer.data_ptr(), places * size, size, slot.data_ptr(), value.data_ptr(), size, B * H, size)


@cache
def _library() -> ctypes.CDLL:
    library = compiled.library()
    assert library is not None, "asked before"
    library.lowest.argtypes = [c_void_p, c_int64, c_int64, c_void_p, *[c_int64] * 5, c_void_p]
    library.lowest.restype = c_int32
    library.put.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p, *[c_int64] * 3]
    library.put.restype = None
    return library
