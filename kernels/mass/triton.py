"""`mass` on a GPU: a first pass for each row's log-sum-exp, a second one that sums each slot's column.

Both passes work in tiles; nothing of the size of the score matrix is stored. Noise is drawn from its counters in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.rules import Rules
from kernels.attend.tiles import (
    LOG2E,
    SCAN,
    dot,
    last_contiguous,
    packed_rows,
    scores,
    start_of,
    strides,
    tiles,
    upcast,
)
from kernels.attend.triton import attend
from kernels.backend import DTYPES
from kernels.launch import launch
from kernels.noise import Stem


@triton.jit
def add_up(
    sums, k, k_at, Q, QPOS, START, TAUS, WEIGHTS, LSE, q_st, qp_st, s_st, t_st, w_st, l_st, lo, hi, d, offset, slope,
    scale, cap, window, D: tl.constexpr, BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, SLOPE: tl.constexpr, SQUARED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums and what the queries [lo, hi) of one head give to the slots of k [N, D]; pointers are the head's own."""
    for i in range(lo, hi, BLOCK_M):
        m = tl.arange(0, BLOCK_M)
        t = i + m
        real = t < hi
        q = tl.load(
            Q + tl.cast(i, tl.int64) * q_st + m[:, None] * q_st + d[None, :],
            mask=real[:, None] & (d < D)[None, :], other=0.0,
        )  # [M, D]  # fmt: skip
        q_at = t + offset
        if POSITIONS:
            q_at = tl.load(QPOS + t * qp_st, mask=real, other=-1).to(tl.int32)
        start = tl.zeros((BLOCK_M,), tl.int32)
        if START is not None:
            start = tl.load(START + t * s_st, mask=real, other=0)
        tau = tl.full((BLOCK_M,), 1.0, tl.float32)
        if TAUS is not None:
            tau = tl.load(TAUS + t * t_st, mask=real, other=1.0)
        # a row that is not there, or that sees nothing, gives exp(x - inf) = 0
        lse = tl.load(LSE + t * l_st, mask=real, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2E
        x = scores(
            dot(q, tl.trans(k), UPCAST), q_at[:, None], k_at[None, :], slope, start[:, None], tau[:, None],
            scale, cap, window, POSITIONS, CAUSAL, CAP, WINDOW, SLOPE, START is not None, TAUS is not None,
        )  # [M, N]  # fmt: skip
        p = tl.exp2(x - lse[:, None])
        if SQUARED:
            p = p * p
        if WEIGHTS is not None:
            p = p * tl.load(WEIGHTS + t * w_st, mask=real, other=0.0)[:, None]
        sums += tl.sum(p, 0)
    return sums


@triton.jit(do_not_specialize=["T", "S", "offset"])
def columns(
    Q, K, QPOS, KPOS, SLOPES, START, TAUS, WEIGHTS, LSE, OUT,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, qp_sb, qp_st, kp_sb, kp_sh, s_sb, s_sh, s_st, t_sb, t_st, w_sb, w_st,
    l_sb, l_sh, l_st, Hq, T, S, offset, scale, cap, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, SQUARED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (j, b * Hq + h): column sums of slots j * BLOCK_N on for one query head."""
    b, h = (tl.program_id(1) // Hq).to(tl.int64), (tl.program_id(1) % Hq).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    inside = n < S
    d = tl.arange(0, BLOCK_D)
    k = tl.load(
        K + b * k_sb + (h // G) * k_sh + n.to(tl.int64)[:, None] * k_ss + d[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    ).to(Q.dtype.element_ty)  # [N, D]  # fmt: skip
    qs, lses, q_pos = Q + b * q_sb + h * q_sh, LSE + b * l_sb + h * l_sh, QPOS + b * qp_sb
    starts, taus, weights = START, TAUS, WEIGHTS
    if START is not None:
        starts = START + b * s_sb + h * s_sh
    if TAUS is not None:
        taus = TAUS + b * t_sb
    if WEIGHTS is not None:
        weights = WEIGHTS + b * w_sb
    slope = 0.0
    if SLOPES is not None:
        slope = tl.load(SLOPES + h)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    lo, hi = T * 0, T
    k_at = n
    if POSITIONS:
        k_at = tl.load(KPOS + b * kp_sb + (h // G) * kp_sh + n, mask=inside, other=-1).to(tl.int32)
        oldest = tl.min(tl.where(k_at >= 0, k_at, 2147483647))
        newest = tl.max(k_at)
        low, high = hi, lo
        for i in range(lo, hi, SCAN):
            t = i + tl.arange(0, SCAN)
            at = tl.load(q_pos + t * qp_st, mask=t < T, other=-1).to(tl.int32)
            sees = at >= oldest
            if WINDOW:
                sees &= at < newest + window
            low = tl.minimum(low, tl.min(tl.where(sees, t, T)))
            high = tl.maximum(high, tl.max(tl.where(sees, t + 1, 0)))
        sums = add_up(
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, q_st, qp_st, s_st, t_st, w_st, l_st, low, high, d,
            offset, slope, scale, cap, window, D, BLOCK_M, True, True, CAP, WINDOW, SLOPES is not None, SQUARED, UPCAST,
        )  # fmt: skip
    else:
        lo = tl.maximum(lo, begin - offset)
        # queries from here on see every slot of the tile
        whole = tl.minimum(hi, lo + tl.cdiv(tl.maximum(begin + BLOCK_N - 1 - offset - lo, 0), BLOCK_M) * BLOCK_M)
        sums = add_up(
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, q_st, qp_st, s_st, t_st, w_st, l_st, lo, whole, d,
            offset, slope, scale, cap, window, D, BLOCK_M, False, True, CAP, False, False, SQUARED, UPCAST,
        )  # fmt: skip
        sums = add_up(
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, q_st, qp_st, s_st, t_st, w_st, l_st, whole, hi, d,
            offset, slope, scale, cap, window, D, BLOCK_M, False, False, CAP, False, False, SQUARED, UPCAST,
        )  # fmt: skip
    tl.store(OUT + tl.program_id(1).to(tl.int64) * S + n, sums, mask=inside)


def mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str,
    *,
    stem: Stem | None = None,
    tau: float | Tensor = 1.0,
    weights: Tensor | None = None,
    squared: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums [B, Hq, S], float32, of the rows' softmax: what `mass`, `noisy_mass` and `weighted_mass` give.

    lse: the rows' log-sum-exp [B, Hq, T] where it is known.
    """
    q, k, k_pos = packed_rows(q.detach()), packed_rows(k.detach()), last_contiguous(k_pos)
    (B, Hq, T, D), (H, S) = q.shape, k.shape[1:3]
    if not rules.plain or rules.window is not None or stem is not None:
        layout = "positions"
    taus = tau.float() if isinstance(tau, Tensor) else None if tau == 1 else torch.full((1, 1), tau, device=q.device)
    start = None if stem is None else start_of(stem, B, Hq)
    if lse is None:
        lse = attend(q, k, None, rules, q_pos, k_pos, layout, lse=True, start=start, tau=taus)[1]
    out = q.new_empty(B, Hq, S, dtype=torch.float32)
    tile = tiles(T, D, D, q.dtype)
    del tile["BLOCK_DV"]
    launch(
        columns, (triton.cdiv(S, tile["BLOCK_N"]), B * Hq),
        q, k, q_pos, k_pos, rules.slopes, start, taus, weights, lse, out,
        *q.stride()[:3], *k.stride()[:3], *strides(q_pos, 2), *strides(k_pos, 2), *strides(start, 3), *strides(taus, 2),
        *strides(weights, 2), *strides(lse, 3),
        Hq, T, S, S - T, rules.scale, rules.softcap or 1.0, rules.window or 0,
        G=Hq // H, D=D, POSITIONS=layout == "positions", CAP=rules.softcap is not None,
        WINDOW=rules.window is not None, SQUARED=squared, UPCAST=upcast(q), **tile,
    )  # fmt: skip
    return out


def attend_with_mass(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, n: int, q_pos: Tensor, k_pos: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """What `kernels.attend_with_mass` gives: the output's log-sum-exp serves the column sums."""
    B, Hq, T, _ = q.shape
    S = k.shape[2]
    if layout == "tail" and (not rules.plain or rules.window is not None):
        layout = "positions"
    if T == 1:  # decoding: the logits are small beside the keys, which are read once
        logits = torch.full((B, Hq, 1, S), -torch.inf, device=q.device) if n else None
        out, lse = attend(q, k, v, rules, q_pos, k_pos, layout, lse=True, logits=logits)
        if logits is None:
            return out, q.new_zeros(B, Hq, S, dtype=torch.float32)
        # a row that sees nothing has no finite logit either
        return out, logits.sub_(lse[..., None].clamp_min(torch.finfo(torch.float32).min)).exp_()[:, :, 0]
    out, lse = attend(q, k, v, rules, q_pos, k_pos, layout, lse=True)
    rest = T - n
    return out, mass(q[:, :, rest:], k, rules, q_pos[:, rest:], k_pos, layout, lse=lse[:, :, rest:])


def compile_cases(brief: bool = False) -> None:
    """Call what is here for types, widths, layouts and rules; brief: for one of each."""
    kinds = [(torch.bfloat16, 128)]
    if not brief:
        kinds += [(dtype, D) for dtype in DTYPES for D in (32, 64, 80, 128, 256)]
    for dtype, D in kinds:
        q, k = torch.empty(1, 4, 300, D, dtype=dtype), torch.empty(1, 1, 300, D, dtype=dtype)
        pos = torch.empty(1, 300, dtype=torch.int32)
        mass(q, k, Rules(1.0), pos, pos[:, None], "tail")
        mass(q[:, :, :1], k, Rules(1.0), pos[:, :1], pos[:, None], "positions")
    at = (pos, pos[:, None], "positions")
    every = Rules(1.0, softcap=1.0, window=9, slopes=torch.empty(4))
    stem, tau = Stem(torch.zeros(1, 4, 300, dtype=torch.long)), torch.ones(1, 300)
    mass(q, k, every, *at, stem=stem, tau=tau)
    mass(q, k, Rules(1.0), *at, weights=tau, squared=True)
    attend_with_mass(q[:, :, :1], k, k, Rules(1.0), 1, pos[:, :1], *at[1:])
    if not brief:
        for rules in (Rules(1.0), Rules(1.0, softcap=1.0), Rules(1.0, window=9), every):
            for noise, temperature in ((None, 1.0), (stem, 1.0), (stem, 2.0), (None, tau)):
                mass(q, k, rules, *at, stem=noise, tau=temperature)
