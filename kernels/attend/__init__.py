"""Attention of new queries over stored slots.

Layouts: q [B, Hq, T, D]; k [B, H, S, D]; v [B, H, S, Dv]; Hq is a multiple of H and query head h reads KV head
h // (Hq // H). Positions are the tokens' own, int, -1 for padding: q_pos [B, T]; k_pos [B, H or 1, S].

A slot may weigh: `bias` is added to its logits and `factor` multiplies its value, [B, H or 1, S], float32 (`weighed`).

Keys and values may be float16 or bfloat16 under float32 queries: they are converted tile by tile, where they are used,
and arithmetic is in float32.
"""

from torch import Tensor

from kernels import reads
from kernels.attend import compiled, lse, mixed, reference, weighed
from kernels.attend.lse import merged, merged_all
from kernels.attend.pages import Pages
from kernels.attend.reference import visible
from kernels.attend.rules import Layout, Rules
from kernels.backend import on_triton


@reads.counted(reads.slots)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout = "positions",
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Attention output [B, Hq, T, Dv] in q's dtype; rows that see no slot give 0."""
    if bias is not None or factor is not None:
        return weighed.attend(q, k, v, rules, q_pos, k_pos, bias, factor)
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


@reads.counted(reads.slots)
def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout = "positions",
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and each row's log-sum-exp of its logits, [B, Hq, T], float32; -inf where it sees none."""
    weigh = bias is not None or factor is not None
    if not weigh and on_triton(q, k, v):
        from kernels.attend import triton

        return triton.attend(q, k, v, rules, q_pos, k_pos, layout, lse=True)
    return lse.attend_with_lse(q, k, v, rules, q_pos, k_pos, bias, factor)


@reads.counted(reads.pages)
def attend_pages(
    q: Tensor,
    pages: Pages,
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    *,
    q_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """One query per row over pages and a rectangular tail, in one softmax: [B, Hq, 1, Dv].

    q [B, Hq, 1, D]; tail: k [B, H, t, D], v [B, H, t, Dv], pos [B, H, t]; q_pos [B, 1]; bias, factor of the tail, where
    the pages have them.
    """
    if bias is None and factor is None and on_triton(q, pages.k, pages.v):
        from kernels.attend import triton

        return triton.attend_pages(q, pages, tail, rules, q_pos)[0]
    return attend_pages_with_mass(q, pages, tail, rules, q_pos=q_pos, bias=bias, factor=factor)[0]


@reads.counted(reads.pages)
def attend_pages_with_mass(
    q: Tensor,
    pages: Pages,
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    *,
    q_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attend_pages` gives, and what every slot gets of every query head's attention: [B, Hq, most + t], float32.

    A head's slots lie in the order of its pages, nothing in the places that it does not have, and the tail's behind
    them. Keys and values are read once; a group's sum, or sum of squares, is taken of what is given.
    """
    if bias is None and factor is None and on_triton(q, pages.k, pages.v):
        from kernels.attend import triton

        out, mass = triton.attend_pages(q, pages, tail, rules, q_pos, mass=True)
        assert mass is not None
        return out, mass
    if compiled.serves(q, pages, tail, rules):
        return compiled.attend_pages(q, pages, tail, rules, q_pos, bias, factor)
    return reference.attend_pages(q, pages, tail, rules, q_pos, bias, factor)


__all__ = [
    "Layout", "Pages", "Rules", "attend", "attend_pages", "attend_pages_with_mass", "attend_with_lse", "merged",
    "merged_all",
    "visible",
]  # fmt: skip
