"""Attention probabilities and their column sums, without an [n, n] matrix.

q [B, Hq, T, D], k [B, H, S, D], v [B, H, S, Dv]; positions and weights of slots as in `attend`: q_pos [B, T], k_pos
[B, H or 1, S], int, -1 for padding, bias and factor. A query that sees nothing gives nothing. layout="tail": no slot is
padding and the queries are the newest slots in order; "positions" is always right. Sums over the last w queries are
those of q[:, :, -w:], q_pos[:, -w:].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import compiled as compiled_forms
from kernels import reads
from kernels.attend import attend
from kernels.attend.rules import Rules
from kernels.backend import on_triton
from kernels.mass import compiled, noisy, reference, rows, weighed, weighted
from kernels.mass.reference import attention_probs
from kernels.mass.seen import moments, seen_by
from kernels.mass.sums import Attended, Sums, of_one_query, summed
from kernels.mass.weighted import ema_weights
from kernels.noise import Stem


@reads.counted(reads.keys)
def mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str = "positions",
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each slot receives from the queries, summed over them: [B, Hq, S], float32."""
    if bias is not None:
        return summed(q, k, rules, Sums(), q_pos, k_pos, bias)
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout)
    if rows.serves(q, k, None, rules):
        return rows.attend_with_sums(q, k, None, rules, [Sums()], q_pos, k_pos, layout)[1][0]
    return reference.mass(q, k, rules, q_pos=q_pos, k_pos=k_pos, layout=layout)


@reads.counted(reads.keys)
def weighted_mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    weights: Tensor | None = None,
    squared: bool = False,
    layout: str = "positions",
) -> Tensor:
    """Sums of weight times attention, or times its square, over the queries: [B, Hq, S], float32.

    weights: float32 per query, [B or 1, T]; None: 1 each. `ema_weights` makes an exponential moving average of it.
    """
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout, weights=weights, squared=squared)
    if rows.serves(q, k, None, rules):
        one = Sums(weights=weights, squared=squared)
        return rows.attend_with_sums(q, k, None, rules, [one], q_pos, k_pos, layout)[1][0]
    return weighted.weighted_mass(q, k, rules, q_pos, k_pos, weights, squared)


@reads.counted(reads.keys)
def noisy_mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    stem: Stem | None,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    tau: float | Tensor = 1.0,
    layout: str = "positions",
) -> Tensor:
    """Rows softmax((logits + Gumbel noise) / tau) summed over the queries: [B, Hq, S], float32.

    stem: keys of the noise up to the slots' positions, state [B, Hq, T or 1]; None: no noise. tau: above 0, one for all
    or per query, [B, T].
    """
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout, stem=stem, tau=tau)
    if rows.serves(q, k, None, rules):
        return rows.attend_with_sums(q, k, None, rules, [Sums(stem=stem, tau=tau)], q_pos, k_pos, layout)[1][0]
    return noisy.noisy_mass(q, k, rules, stem, q_pos, k_pos, tau, layout)


def noisy_rows(probs: Tensor, stem: Stem, k_pos: Tensor, tau: Tensor, q_pos: Tensor | None = None) -> Tensor:
    """Of one query, whose attention is known, what softmax((logits + noise) / tau) is: summed over a group, [B, H, S].

    probs [B, Hq, S], k_pos [B, H, S], stem.state [B, Hq, 1], tau [B].  q_pos [B]: the query's position, one key more of
    the noise; None: the stem has all.
    """
    if probs.dtype == torch.float32 and compiled_forms.on_compiled(probs, k_pos):
        return rows.noisy_rows(probs, stem, k_pos, tau, q_pos)
    return noisy.noisy_rows(probs, stem, k_pos, tau, q_pos)


@reads.counted(reads.slots)
def attend_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    n: int,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str = "positions",
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and `mass` of the newest n of the queries, computed together."""
    if bias is not None or factor is not None:
        out, (sums,) = weighed.attend_with_sums(q, k, v, rules, [Sums(newest=n)], q_pos, k_pos, bias, factor)
        assert out is not None
        return out, sums
    if on_triton(q, k, v):
        from kernels.mass import triton

        return triton.attend_with_mass(q, k, v, rules, n, q_pos, k_pos, layout)
    if compiled.serves(q, k, v, rules, n, layout):
        return compiled.attend_with_mass(q, k, v, rules)
    if q.shape[2] > 1 and rows.serves(q, k, v, rules):
        out, (sums,) = rows.attend_with_sums(q, k, v, rules, [Sums(newest=n)], q_pos, k_pos, layout)
        assert out is not None
        return out, sums
    return reference.attend_with_mass(q, k, v, rules, n, q_pos=q_pos, k_pos=k_pos, layout=layout)


@reads.counted(reads.slots)
def attend_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rules: Rules,
    sums: Sequence[Sums],
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: str = "positions",
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> Attended:
    """What `attend` gives (None without v) and any sums over its rows, each [B, Hq, S], from one product q·k.

    In one pass on a CPU in C++; in Triton in one pass after the output's, and one more where noise is asked for;
    elsewhere each on its own. Of one query they are made of its attention, which comes with its output.
    """
    if bias is not None or factor is not None:
        return weighed.attend_with_sums(q, k, v, rules, sums, q_pos, k_pos, bias, factor)
    if q.shape[2] == 1 and v is not None and all(one.plain for one in sums):
        out, probs = attend_with_mass(q, k, v, rules, 1, q_pos=q_pos, k_pos=k_pos, layout=layout)
        return out, [of_one_query(probs, one, q_pos, k_pos) for one in sums]
    if any(one.greatest for one in sums):  # by its rows, beside sums that come with the output
        added = [one for one in sums if not one.greatest]
        at: dict[str, Any] = {"q_pos": q_pos, "k_pos": k_pos, "layout": layout}
        out, values = attend_with_sums(q, k, v, rules, added, **at) if added or v is not None else (None, [])
        rest = iter(values)
        return out, [summed(q, k, rules, one, q_pos, k_pos) if one.greatest else next(rest) for one in sums]
    if on_triton(q, k, *(() if v is None else (v,))):
        from kernels.mass import triton

        return triton.attend_with_sums(q, k, v, rules, sums, q_pos, k_pos, layout)
    if rows.serves(q, k, v, rules):
        return rows.attend_with_sums(q, k, v, rules, sums, q_pos, k_pos, layout)
    out = None if v is None else attend(q, k, v, rules, q_pos=q_pos, k_pos=k_pos)
    return out, [summed(q, k, rules, one, q_pos, k_pos) for one in sums]


__all__ = [
    "Attended", "Sums", "attend_with_mass", "attend_with_sums", "attention_probs", "ema_weights", "mass", "moments",
    "noisy_mass", "noisy_rows", "seen_by", "weighted_mass",
]  # fmt: skip
