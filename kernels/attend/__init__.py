"""Attention of new queries over stored slots.

Layouts: q [B, Hq, T, D]; k [B, H, S, D]; v [B, H, S, Dv]; Hq is a multiple of H and query head h reads KV head
h // (Hq // H). Positions are the tokens' own, int, -1 for padding: q_pos [B, T]; k_pos [B, H or 1, S].

Keys and values may be float16 or bfloat16 under float32 queries: they are converted tile by tile, where they are used,
and arithmetic is in float32.
"""

from torch import Tensor

from kernels.attend import compiled, mixed, reference
from kernels.attend.lse import log_sum_exp, merged
from kernels.attend.reference import visible
from kernels.attend.rules import Layout, Rules
from kernels.backend import on_triton


def attend(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, layout: Layout = "positions"
) -> Tensor:
    """Attention output [B, Hq, T, Dv] in q's dtype; rows that see no slot give 0."""
    if on_triton(q, k, v):
        from kernels.attend import triton

        return triton.attend(q, k, v, rules, q_pos, k_pos, layout)[0]
    if q.dtype != k.dtype:
        return mixed.attend(q, k, v, rules, q_pos, k_pos, layout)
    if layout == "all" and rules.plain:
        return reference.attend_all(q, k, v, rules)
    if layout == "causal" and rules.plain:
        return reference.attend_causal(q, k, v, rules)
    return reference.attend_positions(q, k, v, rules, q_pos, k_pos)


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, layout: Layout = "positions"
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and each row's log-sum-exp of its logits, [B, Hq, T], float32; -inf where it sees none."""
    if on_triton(q, k, v):
        from kernels.attend import triton

        return triton.attend(q, k, v, rules, q_pos, k_pos, layout, lse=True)
    out = attend(q, k, v, rules, q_pos=q_pos, k_pos=k_pos, layout=layout)
    return out, log_sum_exp(q, k, rules, q_pos, k_pos)


def attend_pages(
    q: Tensor,
    stored: tuple[Tensor, Tensor, Tensor, Tensor],
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    *,
    q_pos: Tensor,
) -> Tensor:
    """One query per row over ragged pages and a rectangular tail, in one softmax: [B, Hq, 1, Dv].

    q [B, Hq, 1, D]; stored: k [P, page, D], v [P, page, Dv], pos [P, page], page_row [P] with values b * H + h in
    ascending order; tail: k [B, H, t, D], v [B, H, t, Dv], pos [B, H, t]; q_pos [B, 1].
    """
    if on_triton(q, stored[0], stored[1]):
        from kernels.attend import triton

        return triton.attend_pages(q, stored, tail, rules, q_pos)
    if compiled.serves(q, stored, tail, rules):
        return compiled.attend_pages(q, stored, tail, rules, q_pos)
    return reference.attend_pages(q, stored, tail, rules, q_pos)


__all__ = ["Layout", "Rules", "attend", "attend_pages", "attend_with_lse", "merged", "visible"]
