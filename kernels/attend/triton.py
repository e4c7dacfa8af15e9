"""`attend` on a GPU: one pass over the slots with a running softmax; long contexts of few queries are split.

Paper: Dao 2023, arXiv:2307.08691 (tiles with a running maximum and sum); for the splits, see splits.py.
Here:  the query heads of a KV head are rows of one tile, r = t * G + g, so that keys and values are read once per
       group. Tiles look up first which slots any of their rows may see, so that causal, padded and windowed layouts
       skip the rest by the same code. What is launched depends on shapes only: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.pages import Pages
from kernels.attend.rules import Rules
from kernels.attend.splits import merged, pick_splits
from kernels.attend.tiles import (
    LN2,
    dot,
    finish,
    last_contiguous,
    packed_rows,
    scores,
    seen_range,
    strides,
    tiles,
    upcast,
)
from kernels.backend import DTYPES
from kernels.launch import launch


@triton.jit
def sweep(
    acc, biggest, total, q, q_at, slope, start, tau, K, V, POS, AT, X, x_row, k_ss, v_ss, lo, hi, d, dv, scale, cap,
    window, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, SLOPE: tl.constexpr,
    NOISE: tl.constexpr, TAU: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running softmax over slots [lo, hi): weighted values, largest logit and sum of weights per row.

    V None: no values are read.  AT: where the slots lie in K, V and POS; None: one after the other.
    X: where logits to the base e go, rows at x_row, or None.  EVEN: whole tiles only.
    """
    for j in range(lo, hi, BLOCK_N):
        n = tl.arange(0, BLOCK_N)
        inside = j + n < hi  # for EVEN it stays unused
        k_mask, v_mask = (d < D)[None, :], (dv < DV)[None, :]
        if not EVEN:
            k_mask, v_mask = inside[:, None] & k_mask, inside[:, None] & v_mask
        first = tl.cast(j, tl.int64)
        keys, place = K + first * k_ss, n
        if AT is not None:
            keys, place = K, tl.load(AT + first + n, mask=inside, other=0).to(tl.int64)
        k = tl.load(keys + place[:, None] * k_ss + d[None, :], mask=k_mask, other=0.0).to(q.dtype)  # [N, D]
        if POSITIONS:
            slots = POS + first
            if AT is not None:
                slots = POS
            k_at = tl.load(slots + place, mask=inside, other=-1).to(tl.int32)
        else:
            k_at = j + n
        x = scores(
            dot(q, tl.trans(k), UPCAST), q_at[:, None], k_at[None, :], slope[:, None], start[:, None], tau[:, None],
            scale, cap, window, POSITIONS, CAUSAL, CAP, WINDOW, SLOPE, NOISE, TAU,
        )  # [M, N]  # fmt: skip
        if not EVEN:
            x = tl.where(inside[None, :], x, -float("inf"))
        if X is not None:
            tl.store(X + x_row[:, None] + (first + n)[None, :], x * LN2, mask=(x_row >= 0)[:, None] & inside[None, :])
        bigger = tl.maximum(biggest, tl.max(x, 1))
        # a row that has seen nothing yet: any finite number stands for its largest logit
        base = tl.where(bigger == -float("inf"), 0.0, bigger)
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(biggest - base)
        total = total * shrink + tl.sum(p, 1)
        biggest = bigger
        if V is not None:
            values = V + first * v_ss
            if AT is not None:
                values = V
            v = tl.load(values + place[:, None] * v_ss + dv[None, :], mask=v_mask, other=0.0).to(q.dtype)  # [N, DV]
            acc = acc * shrink[:, None] + dot(p.to(q.dtype), v, UPCAST)
    return acc, biggest, total


@triton.jit(do_not_specialize=["T", "S", "split", "splits", "offset"])
def rectangular(
    Q, K, V, QPOS, KPOS, SLOPES, START, TAUS, OUT, LSE, X,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, qp_sb, qp_st, kp_sb, kp_sh, s_sb, s_sh, s_st, t_sb, t_st,
    H, T, S, split, splits, offset, scale, cap, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, SCANS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h, j): rows i * BLOCK_M on of one KV head over slots [j * split, (j + 1) * split)."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = r < T * G
    t, head = r // G, h * G + r % G  # [M]
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(
        Q + b * q_sb + head[:, None] * q_sh + t.to(tl.int64)[:, None] * q_st + d[None, :],
        mask=real[:, None] & (d < D)[None, :], other=0.0,
    )  # [M, D]  # fmt: skip
    lo = tl.program_id(2) * split
    hi = tl.minimum(lo + split, S)
    kp = KPOS
    if POSITIONS:
        kp = KPOS + b * kp_sb + h * kp_sh
        q_at = tl.load(QPOS + b * qp_sb + t * qp_st, mask=real, other=-1).to(tl.int32)
        if SCANS:
            first = tl.min(tl.where(real & (q_at >= 0), q_at, 2147483647))
            low, high = seen_range(kp, lo, hi, first, tl.max(q_at), window, WINDOW)
            lo, hi = low // BLOCK_N * BLOCK_N, high
    else:
        q_at = t + offset
        if CAUSAL:
            hi = tl.minimum(hi, tl.max(tl.where(real, q_at, 0)) + 1)
        if WINDOW:
            lo = tl.maximum(lo, (tl.program_id(0) * BLOCK_M // G + offset - window + 1) // BLOCK_N * BLOCK_N)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if SLOPES is not None:
        slope = tl.load(SLOPES + head, mask=real, other=0.0)
    start = tl.zeros((BLOCK_M,), tl.int32)
    if START is not None:
        start = tl.load(START + b * s_sb + head * s_sh + t * s_st, mask=real, other=0)
    tau = tl.full((BLOCK_M,), 1.0, tl.float32)
    if TAUS is not None:
        tau = tl.load(TAUS + b * t_sb + t * t_st, mask=real, other=1.0)
    row = (b * H * G + head) * T + t  # [M] of [B, Hq, T]
    values = V
    if V is not None:
        values = V + b * v_sb + h * v_sh
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    biggest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    keys, x_row = K + b * k_sb + h * k_sh, tl.where(real, row * S, -1)
    if not POSITIONS and not WINDOW:  # tiles that every row sees whole need no mask
        whole = hi
        if CAUSAL:
            whole = tl.minimum(hi, tl.program_id(0) * BLOCK_M // G + offset + 1)
        whole = lo + tl.maximum(whole - lo, 0) // BLOCK_N * BLOCK_N
        acc, biggest, total = sweep(
            acc, biggest, total, q, q_at, slope, start, tau, keys, values, kp, None, X, x_row, k_ss, v_ss, lo, whole, d,
            dv, scale, cap, window, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, False, CAP, False, SLOPES is not None,
            START is not None, TAUS is not None, True, UPCAST,
        )  # fmt: skip
        lo = whole
    acc, biggest, total = sweep(
        acc, biggest, total, q, q_at, slope, start, tau, keys, values, kp, None, X, x_row, k_ss, v_ss, lo, hi, d, dv,
        scale, cap, window, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, POSITIONS, CAUSAL, CAP, WINDOW, SLOPES is not None,
        START is not None, TAUS is not None, False, UPCAST,
    )  # fmt: skip
    finish(acc, biggest, total, OUT, LSE, row * splits + tl.program_id(2), dv, real, DV)


@triton.jit(do_not_specialize=["most", "tail", "splits"])
def ragged(
    Q, K, V, POS, AT, FIRST, HELD, TAIL_K, TAIL_V, TAIL_POS, QPOS, SLOPES, OUT, LSE, X,
    q_sb, q_sh, k_ss, v_ss, tk_sb, tk_sh, tk_ss, tv_sb, tv_sh, tv_ss, tp_sb, tp_sh, qp_sb,
    H, most, tail, splits, scale, cap, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, j): one token's group of heads over part j of the head's own pages; the last has the tail.

    X: logits to the base e, [B, Hq, most + tail], or None.
    """
    r = tl.program_id(0)
    b, h = (r // H).to(tl.int64), (r % H).to(tl.int64)
    g = tl.arange(0, BLOCK_M)
    real = g < G
    head = h * G + g
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(
        Q + b * q_sb + head[:, None] * q_sh + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    )  # [M, D]
    q_at = tl.load(QPOS + b * qp_sb).to(tl.int32) + tl.zeros((BLOCK_M,), tl.int32)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if SLOPES is not None:
        slope = tl.load(SLOPES + head, mask=real, other=0.0)
    begin, held = tl.load(FIRST + r), tl.load(HELD + r)
    split = tl.cdiv(tl.cdiv(held, splits), BLOCK_N) * BLOCK_N
    lo = tl.program_id(1) * split
    hi = tl.minimum(lo + split, held).to(tl.int32)
    lo = lo.to(tl.int32)
    nothing = tl.zeros((BLOCK_M,), tl.int32)
    one = tl.full((BLOCK_M,), 1.0, tl.float32)
    row = b * H * G + head
    x_row = tl.where(real, row * (most + tail), -1)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    biggest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc, biggest, total = sweep(
        acc, biggest, total, q, q_at, slope, nothing, one, K, V, POS, AT + begin, X, x_row, k_ss, v_ss, lo, hi, d, dv,
        scale, cap, window,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, True, CAP, WINDOW, SLOPES is not None, False, False, False, UPCAST,
    )  # fmt: skip
    mine = tl.where(tl.program_id(1) == splits - 1, tail, 0)
    acc, biggest, total = sweep(
        acc, biggest, total, q, q_at, slope, nothing, one, TAIL_K + b * tk_sb + h * tk_sh,
        TAIL_V + b * tv_sb + h * tv_sh, TAIL_POS + b * tp_sb + h * tp_sh, None, X,
        tl.where(real, x_row + most, -1), tk_ss, tv_ss, mine - mine, mine, d, dv, scale, cap, window,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, True, CAP, WINDOW, SLOPES is not None, False, False, False, UPCAST,
    )  # fmt: skip
    finish(acc, biggest, total, OUT, LSE, row * splits + tl.program_id(1), dv, real, DV)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str,
    *,
    lse: bool = False,
    start: Tensor | None = None,
    tau: Tensor | None = None,
    logits: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Any, Any]:
    """Output [B, Hq, T, Dv], None without v, and the log-sum-exp of the logits [B, Hq, T], float32, if lse is set.

    layout: as in `kernels.attend`; "tail": the queries are the newest slots, in order.  start: of the logits' noise
    (`start_of`), which wants layout "positions".  tau: the logits' divisor, [B or 1, T or 1], float32.
    logits: [B, Hq, T, S], float32, takes them where they are seen.
    splits: parts of the slots that run side by side; None: as the device asks for.
    """
    q, k, v = packed_rows(q), packed_rows(k), None if v is None else packed_rows(v)
    (B, Hq, T, D), (H, S) = q.shape, k.shape[1:3]
    G, DV = Hq // H, D if v is None else v.shape[-1]
    positions, causal = layout == "positions" or (layout == "all" and rules.slopes is not None), layout != "all"
    window = rules.window if causal else None
    tile = tiles(T * G, D, DV, q.dtype)
    row_tiles = triton.cdiv(T * G, tile["BLOCK_M"])
    if splits is None:
        splits = pick_splits(q.device, row_tiles * B * H, S)
    split = triton.cdiv(triton.cdiv(S, splits), tile["BLOCK_N"]) * tile["BLOCK_N"]
    splits = max(1, triton.cdiv(S, max(1, split)))
    out = None if v is None else q.new_empty(B, Hq, T, DV)
    sums = q.new_empty(B, Hq, T, dtype=torch.float32) if lse else None
    part, part_lse = out, sums
    if splits > 1:
        part = None if v is None else q.new_empty(B, Hq, T, splits, DV, dtype=torch.float32)
        part_lse = q.new_empty(B, Hq, T, splits, dtype=torch.float32)
    k_pos = last_contiguous(k_pos)
    launch(
        rectangular, (row_tiles, B * H, splits),
        q, k, v, q_pos, k_pos, rules.slopes, start, tau, part, part_lse, logits,
        *q.stride()[:3], *k.stride()[:3], *((0, 0, 0) if v is None else v.stride()[:3]),
        *strides(q_pos, 2), *strides(k_pos, 2), *strides(start, 3), *strides(tau, 2),
        H, T, S, split, splits, S - T, rules.scale, rules.softcap or 1.0, window or 0,
        G=G, D=D, DV=DV, POSITIONS=positions, CAUSAL=causal, CAP=rules.softcap is not None, WINDOW=window is not None,
        SCANS=positions and (T > 1 or window is not None), UPCAST=upcast(q), **tile,
    )  # fmt: skip
    if splits > 1:
        merged(part, part_lse, out, sums, splits, B * Hq * T, DV)
    return out, sums


def attend_pages(
    q: Tensor,
    pages: Pages,
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    q_pos: Tensor,
    *,
    mass: bool = False,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `kernels.attend_pages_with_mass` gives; no attention if mass is not set.

    Logits are small beside the keys, so that these are read once and the attention is made of the logits.
    """
    k_tail, v_tail, tail_pos = packed_rows(tail[0]), packed_rows(tail[1]), last_contiguous(tail[2])
    q, k, v = packed_rows(q), pages.k, pages.v
    (B, Hq, _, D), (H, t), DV = q.shape, k_tail.shape[1:3], v.shape[-1]
    G = Hq // H
    tile = tiles(G, D, DV, q.dtype)
    if splits is None:  # heads differ in length: more parts than for equal ones even that out
        splits = pick_splits(q.device, triton.cdiv(B * H, 2), triton.cdiv(len(pages.at), B * H))
    out = q.new_empty(B, Hq, 1, DV)
    logits = torch.full((B, Hq, pages.most + t), -torch.inf, device=q.device) if mass else None
    lse = q.new_empty(B, Hq, 1, dtype=torch.float32) if mass else None
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(B, Hq, 1, splits, DV, dtype=torch.float32)
        part_lse = q.new_empty(B, Hq, 1, splits, dtype=torch.float32)
    launch(
        ragged, (B * H, splits),
        q, k, v, pages.pos, pages.at, pages.first, pages.held, k_tail, v_tail, tail_pos, q_pos, rules.slopes, part,
        part_lse, logits,
        q.stride(0), q.stride(1), k.stride(0), v.stride(0), *k_tail.stride()[:3], *v_tail.stride()[:3],
        *strides(tail_pos, 2), *strides(q_pos, 1),
        H, pages.most, t, splits, rules.scale, rules.softcap or 1.0, rules.window or 0,
        G=G, D=D, DV=DV, CAP=rules.softcap is not None, WINDOW=rules.window is not None,
        UPCAST=upcast(q), **tile,
    )  # fmt: skip
    if splits > 1:
        assert part_lse is not None
        merged(part, part_lse, out, lse, splits, B * Hq, DV)
    if logits is None or lse is None:
        return out, None
    # a row that sees nothing has no finite logit either
    return out, logits.sub_(lse.clamp_min(torch.finfo(torch.float32).min)).exp_()


def compile_cases(brief: bool = False) -> None:
    """Call what is here for types, widths, group sizes, layouts and rules; brief: for one of each."""
    kinds = [(torch.bfloat16, 128, 4)]
    if not brief:
        kinds += [(dtype, D, 4) for dtype in DTYPES for D in (32, 64, 80, 128, 256)]
        kinds += [(torch.float16, 128, 1), (torch.float16, 128, 8)]
    for dtype, D, G in kinds:
        q, k = torch.empty(1, G, 300, D, dtype=dtype), torch.empty(1, 1, 300, D, dtype=dtype)
        pos = torch.empty(1, 300, dtype=torch.int32)
        for T, splits in ((1, 2), (300, 1)):
            attend(q[:, :, :T], k, k, Rules(1.0), pos[:, :T], pos[:, None], "positions", splits=splits)
        first = torch.zeros(1, dtype=torch.long)
        pages = Pages(k[0, 0], k[0, 0], pos[0], pos[0], first, first + 300, 300)
        attend_pages(q[:, :, :1], pages, (k, k, pos[:, None]), Rules(1.0), pos[:, :1], splits=2)
    attend(q[:, :, :1].float(), k.half(), k.half(), Rules(1.0), pos[:, :1], pos[:, None], "all")
    # the rules and layouts at one width, where the query and key of the last kind are small
    at = (pos[:, :300], pos[:, None])
    every = Rules(1.0, softcap=1.0, window=9, slopes=torch.empty(G))
    attend(q, k, k, every, *at, "causal")
    attend(q[:, :, :1], k, k, Rules(1.0), at[0][:, :1], at[1], "all", lse=True)
    attend_pages(q[:, :, :1], pages, (k, k, pos[:, None]), Rules(1.0), pos[:, :1], mass=True, splits=1)
    if not brief:
        for rules in (Rules(1.0), Rules(1.0, softcap=1.0), Rules(1.0, window=9), every):
            for layout in ("all", "causal", "positions"):
                attend(q, k, k, rules, *at, layout, lse=True)
                attend(q[:, :, :1], k, k, rules, at[0][:, :1], at[1], layout, splits=2)
            attend_pages(q[:, :, :1], pages, (k, k, pos[:, None]), rules, pos[:, :1], splits=2)
