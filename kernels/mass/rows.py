"""`attend_with_sums` on a CPU in C++: rows of attention are made once, for the output and for every sum of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import compiled

if TYPE_CHECKING:
    from kernels.attend.rules import Rules
    from kernels.mass.sums import Sums
    from kernels.noise import Stem

# channels of a head come in whole vectors
LANES = 16
EVERY = (1 << 63) - 1  # no greatest distance


class _Sums(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p), ("weights", c_void_p), ("start", c_void_p), ("taus", c_void_p), ("weights_batch", c_int64),
        ("start_head", c_int64), ("start_query", c_int64), ("first", c_int64), ("least", c_int64), ("most", c_int64),
        ("tau", c_float), ("squared", c_int32),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("out", c_void_p), ("q_pos", c_void_p), ("k_pos", c_void_p),
        ("sums", c_void_p), ("q_strides", c_int64 * 3), ("k_strides", c_int64 * 3), ("v_strides", c_int64 * 3),
        ("pos_strides", c_int64 * 2), ("batch", c_int64), ("heads", c_int64), ("group", c_int64), ("queries", c_int64),
        ("slots", c_int64), ("width", c_int64), ("value_width", c_int64), ("n_sums", c_int64), ("window", c_int64),
        ("scale", c_float), ("tail", c_int32), ("threads", c_int32), ("kind", c_int32),
    ]  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor | None, rules: Rules) -> bool:
    """Whether the loops take these tensors and rules."""
    given = [q, k] if v is None else [q, k, v]
    return (
        rules.plain
        and q.shape[2] > 0
        and compiled.fits(*given)
        and all(x.stride(-1) == 1 and x.shape[-1] % LANES == 0 for x in given)
        and compiled.on_compiled(*given)
    )


def attend_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rules: Rules,
    sums: Sequence[Sums],
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str,
) -> tuple[Tensor | None, list[Tensor]]:
    """What `kernels.mass.attend_with_sums` gives."""
    B, Hq, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    width = 0 if v is None else v.shape[-1]
    out = None if v is None else q.new_empty(B, Hq, T, width)
    results = [q.new_empty(B, Hq, S) for _ in sums]
    tail = layout == "tail" and rules.window is None
    q_pos, k_pos = q_pos.to(torch.int32).contiguous(), k_pos.to(torch.int32)
    if k_pos.stride(-1) != 1:
        k_pos = k_pos.contiguous()
    k_pos = k_pos.expand(B, H, S)
    alive: list[Tensor] = []  # what the pointers below point to
    asked = (_Sums * len(sums))(*(_request(one, into, T, alive) for one, into in zip(sums, results, strict=True)))
    pointers = [None if x is None else x.data_ptr() for x in (q, k, v, out, q_pos, k_pos)]
    strides = [(c_int64 * 3)(*((0, 0, 0) if x is None else x.stride()[:3])) for x in (q, k, v)]
    sizes = B, H, Hq // H, T, S, D, width, len(sums), rules.window or 0
    where = (c_int64 * 2)(*k_pos.stride()[:2])
    how = rules.scale, tail, torch.get_num_threads(), compiled.KINDS[k.dtype]
    _library().attend_rows(_Rows(*pointers, ctypes.addressof(asked), *strides, where, *sizes, *how))
    return out, results


def _request(one: Sums, into: Tensor, T: int, alive: list[Tensor]) -> _Sums:
    def address(x: Tensor | None) -> int | None:
        if x is not None:
            alive.append(x)
        return None if x is None else x.data_ptr()

    weights = None if one.weights is None else one.weights.float().contiguous()
    start = None if one.stem is None else one.stem.start().contiguous()  # [B, Hq, T or 1]
    taus = one.tau.float().contiguous() if isinstance(one.tau, Tensor) else None
    return _Sums(
        address(into), address(weights), address(start), address(taus),
        0 if weights is None or len(weights) == 1 else T,
        0 if start is None else start.shape[2], int(start is not None and start.shape[2] > 1),
        0 if one.newest is None else T - one.newest, one.least, EVERY if one.most is None else one.most,
        1.0 if isinstance(one.tau, Tensor) else one.tau, one.squared,
    )  # fmt: skip


def noisy_rows(probs: Tensor, stem: Stem, k_pos: Tensor, tau: Tensor, q_pos: Tensor | None) -> Tensor:
    """What `kernels.mass.noisy_rows` gives."""
    B, Hq, S = probs.shape
    H = k_pos.shape[1]
    out = probs.new_empty(B, H, S)
    probs, state, tau = probs.contiguous(), stem.state.contiguous(), tau.float().expand(B).contiguous()
    k_pos = k_pos.to(torch.int32)
    if k_pos.stride(-1) != 1:
        k_pos = k_pos.contiguous()
    q_pos = None if q_pos is None else q_pos.to(torch.int32).contiguous()
    query = None if q_pos is None else q_pos.data_ptr()
    _library().noisy_rows(
        probs.data_ptr(), state.data_ptr(), query, tau.data_ptr(), k_pos.data_ptr(), *k_pos.stride()[:2],
        out.data_ptr(), B, H, Hq // H, S, torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def _library() -> ctypes.CDLL:
    library = compiled.library()
    assert library is not None, "asked before"
    library.attend_rows.argtypes, library.attend_rows.restype = [ctypes.POINTER(_Rows)], None
    sizes = [c_int64] * 4
    library.noisy_rows.argtypes = [c_void_p] * 5 + [c_int64] * 2 + [c_void_p, *sizes, c_int32]
    library.noisy_rows.restype = None
    return library
