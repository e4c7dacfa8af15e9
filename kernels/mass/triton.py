"""Column sums on a GPU: a first pass for each row's log-sum-exp, a second one that sums each slot's column.

Both passes work in tiles; nothing of the size of the score matrix is stored. Noise is drawn from its counters in both.
Any number of sums come from one product in the second pass; the first one is the output's own, and once more for every
kind of noise and every other temperature that is asked for.
"""

from collections.abc import Iterable, Sequence

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
from kernels.mass.sums import Sums
from kernels.noise import Stem

EVERY = 2**31 - 1  # no greatest distance


@triton.jit
def add_up(
    sums, k, k_at, Q, QPOS, START, TAUS, WEIGHTS, LSE, NEAR, q_st, qp_st, s_sn, s_st, t_sn, t_st, w_sn, w_st, l_sn,
    l_st, lo, hi, d, offset, slope, scale, cap, window, D: tl.constexpr, BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, SLOPE: tl.constexpr, N: tl.constexpr,
    ROOM: tl.constexpr, SQUARED: tl.constexpr, NOISY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums [ROOM, slots] and what the queries [lo, hi) of one head give to the slots of k [slots, D] in each of N sums.

    Pointers are the head's own; *_sn leads to the next sum's. SQUARED, NOISY: bit i is of sum i.
    """
    which = tl.arange(0, ROOM)[:, None]
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
        product = dot(q, tl.trans(k), UPCAST)  # [M, slots], of all sums
        for j in tl.static_range(N):
            start = tl.zeros((BLOCK_M,), tl.int32)
            if START is not None:
                start = tl.load(START + j * s_sn + t * s_st, mask=real, other=0)
            tau = tl.full((BLOCK_M,), 1.0, tl.float32)
            if TAUS is not None:
                tau = tl.load(TAUS + j * t_sn + t * t_st, mask=real, other=1.0)
            # a row that is not there, or that sees nothing, gives exp(x - inf) = 0
            lse = tl.load(LSE + j * l_sn + t * l_st, mask=real, other=float("inf"))
            lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2E
            x = scores(
                product, q_at[:, None], k_at[None, :], slope, start[:, None], tau[:, None], scale, cap, window,
                POSITIONS, CAUSAL, CAP, WINDOW, SLOPE, (NOISY >> j) % 2 == 1, TAUS is not None,
            )  # [M, slots]  # fmt: skip
            p = tl.exp2(x - lse[:, None])
            if (SQUARED >> j) % 2 == 1:
                p = p * p
            if WEIGHTS is not None:
                p = p * tl.load(WEIGHTS + j * w_sn + t * w_st, mask=real, other=0.0)[:, None]
            if NEAR is not None:
                back = q_at[:, None] - k_at[None, :]
                p = tl.where((back >= tl.load(NEAR + 2 * j)) & (back < tl.load(NEAR + 2 * j + 1)), p, 0.0)
            sums += tl.where(which == j, tl.sum(p, 0)[None, :], 0.0)
    return sums


@triton.jit(do_not_specialize=["T", "S", "offset"])
def columns(
    Q, K, QPOS, KPOS, SLOPES, START, TAUS, WEIGHTS, LSE, NEAR, OUT,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, qp_sb, qp_st, kp_sb, kp_sh, s_sn, s_sb, s_sh, s_st, t_sn, t_sb, t_st,
    w_sn, w_sb, w_st, l_sn, l_sb, l_sh, l_st, o_sn, Hq, T, S, offset, scale, cap, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr, ROOM: tl.constexpr,
    SQUARED: tl.constexpr, NOISY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (j, b * Hq + h): N column sums of slots j * BLOCK_N on for one query head."""
    b, h = (tl.program_id(1) // Hq).to(tl.int64), (tl.program_id(1) % Hq).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    inside = n < S
    d = tl.arange(0, BLOCK_D)
    k = tl.load(
        K + b * k_sb + (h // G) * k_sh + n.to(tl.int64)[:, None] * k_ss + d[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    ).to(Q.dtype.element_ty)  # [slots, D]  # fmt: skip
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
    sums = tl.zeros((ROOM, BLOCK_N), tl.float32)
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
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, NEAR, q_st, qp_st, s_sn, s_st, t_sn, t_st, w_sn,
            w_st, l_sn, l_st, low, high, d, offset, slope, scale, cap, window, D, BLOCK_M, True, True, CAP, WINDOW,
            SLOPES is not None, N, ROOM, SQUARED, NOISY, UPCAST,
        )  # fmt: skip
    else:
        lo = tl.maximum(lo, begin - offset)
        # queries from here on see every slot of the tile
        whole = tl.minimum(hi, lo + tl.cdiv(tl.maximum(begin + BLOCK_N - 1 - offset - lo, 0), BLOCK_M) * BLOCK_M)
        sums = add_up(
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, NEAR, q_st, qp_st, s_sn, s_st, t_sn, t_st, w_sn,
            w_st, l_sn, l_st, lo, whole, d, offset, slope, scale, cap, window, D, BLOCK_M, False, True, CAP,
            False, False, N, ROOM, SQUARED, NOISY, UPCAST,
        )  # fmt: skip
        sums = add_up(
            sums, k, k_at, qs, q_pos, starts, taus, weights, lses, NEAR, q_st, qp_st, s_sn, s_st, t_sn, t_st, w_sn,
            w_st, l_sn, l_st, whole, hi, d, offset, slope, scale, cap, window, D, BLOCK_M, False, False, CAP,
            False, False, N, ROOM, SQUARED, NOISY, UPCAST,
        )  # fmt: skip
    which = tl.arange(0, ROOM).to(tl.int64)[:, None]
    where = OUT + which * o_sn + tl.program_id(1).to(tl.int64) * S + n[None, :]
    tl.store(where, sums, mask=(which < N) & inside[None, :])


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
    one = Sums(weights=weights, squared=squared, stem=stem, tau=tau)
    return summed(q, k, rules, [one], q_pos, k_pos, layout, lse)[0]


def summed(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    sums: Sequence[Sums],
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str,
    lse: Tensor | None = None,
) -> Tensor:
    """All sums over the rows of attention from one product, [N, B, Hq, S], float32.

    lse: the rows' log-sum-exp [B, Hq, T], without noise at temperature 1, where it is known.
    """
    most = max(q.shape[2] if one.newest is None else one.newest for one in sums)
    older = q.shape[2] - most  # queries that no sum asks for
    q, q_pos, lse = q[:, :, older:], q_pos[:, older:], None if lse is None else lse[:, :, older:]
    q, k, k_pos = packed_rows(q.detach()), packed_rows(k.detach()), last_contiguous(k_pos)
    (B, Hq, T, D), (H, S) = q.shape, k.shape[1:3]
    near = any(one.least > 0 or one.most is not None for one in sums)
    if not rules.plain or rules.window is not None or near or any(one.stem is not None for one in sums):
        layout = "positions"
    starts = [None if one.stem is None else _of_rows(start_of(one.stem, B, Hq), older) for one in sums]
    taus = [_temperature(one.tau, older, q.device) for one in sums]
    alike: dict[tuple[int | None, float | int], Tensor | None] = {(None, 1.0): lse}
    of_rows = []
    for one, start, tau in zip(sums, starts, taus, strict=True):
        kind = None if one.stem is None else id(one.stem), id(one.tau) if isinstance(one.tau, Tensor) else one.tau
        if alike.get(kind) is None:
            alike[kind] = attend(q, k, None, rules, q_pos, k_pos, layout, lse=True, start=start, tau=tau)[1]
        of_rows.append(alike[kind])
    lses, start = _stacked(of_rows, 0, (B, Hq, T)), _stacked(starts, 0, (B, Hq, T), torch.int32)
    tau, weight = _stacked(taus, 1, (B, T)), _stacked([_weight(one, T, older, q.device) for one in sums], 1, (B, T))
    out = q.new_empty(len(sums), B, Hq, S, dtype=torch.float32)
    tile = tiles(T, D, D, q.dtype)
    del tile["BLOCK_DV"]
    launch(
        columns, (triton.cdiv(S, tile["BLOCK_N"]), B * Hq),
        q, k, q_pos, k_pos, rules.slopes, start, tau, weight, lses, _distances(sums, q.device) if near else None, out,
        *q.stride()[:3], *k.stride()[:3], *strides(q_pos, 2), *strides(k_pos, 2), *strides(start, 4), *strides(tau, 3),
        *strides(weight, 3), *strides(lses, 4), out.stride(0),
        Hq, T, S, S - T, rules.scale, rules.softcap or 1.0, rules.window or 0,
        G=Hq // H, D=D, POSITIONS=layout == "positions", CAP=rules.softcap is not None,
        WINDOW=rules.window is not None, N=len(sums), ROOM=triton.next_power_of_2(len(sums)),
        SQUARED=_bits(one.squared for one in sums), NOISY=_bits(one.stem is not None for one in sums),
        UPCAST=upcast(q), **tile,
    )  # fmt: skip
    return out


def _of_rows(x: Tensor, older: int) -> Tensor:
    """Of x [..., T or 1] the rows after the `older` ones."""
    return x if x.shape[-1] == 1 else x[..., older:]


def _temperature(tau: float | Tensor, older: int, device: torch.device) -> Tensor | None:
    """[B or 1, T or 1], float32; None: it changes nothing."""
    if isinstance(tau, Tensor):
        return _of_rows(tau.float(), older)
    return None if tau == 1 else torch.full((1, 1), tau, device=device)


def _weight(one: Sums, T: int, older: int, device: torch.device) -> Tensor | None:
    """[B or 1, T or 1], 0 for queries that the sum does not ask for; None: all are 1."""
    weights = None if one.weights is None else _of_rows(one.weights.float(), older)
    if one.newest is None or one.newest == T:
        return weights
    asked = torch.arange(T, device=device)[None] >= T - one.newest
    return asked.float() if weights is None else weights * asked


def _stacked(
    parts: Sequence[Tensor | None], fill: float, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """One tensor [N, *shape] of what each sum has, `fill` where it has nothing; None: none has anything."""
    given = next((x for x in parts if x is not None), None)
    if given is None:
        return None
    if len(parts) == 1:
        return given[None]
    empty = torch.full((1,) * len(shape), fill, dtype=dtype, device=given.device)
    return torch.stack([(empty if x is None else x).expand(shape) for x in parts])


def _distances(sums: Sequence[Sums], device: torch.device) -> Tensor:
    """Least and greatest distance of each sum, [N, 2], int32; written on the device itself."""
    bounds = [n for one in sums for n in (one.least, EVERY if one.most is None else min(one.most, EVERY))]
    return torch.stack([torch.full((), n, dtype=torch.int32, device=device) for n in bounds]).view(-1, 2)


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


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
    """What `kernels.attend_with_sums` gives: the output's log-sum-exp serves the sums without noise."""
    if layout == "tail" and (not rules.plain or rules.window is not None):
        layout = "positions"
    out, lse = (None, None) if v is None else attend(q, k, v, rules, q_pos, k_pos, layout, lse=True)
    return out, list(summed(q, k, rules, sums, q_pos, k_pos, layout, lse)) if sums else []


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
    asked = [Sums(), Sums(stem=stem, tau=tau, most=9), Sums(squared=True, newest=5)]
    attend_with_sums(q, k, k, Rules(1.0), asked, *at)
    attend_with_mass(q[:, :, :1], k, k, Rules(1.0), 1, pos[:, :1], *at[1:])
    if not brief:
        for rules in (Rules(1.0), Rules(1.0, softcap=1.0), Rules(1.0, window=9), every):
            for noise, temperature in ((None, 1.0), (stem, 1.0), (stem, 2.0), (None, tau)):
                mass(q, k, rules, *at, stem=noise, tau=temperature)
