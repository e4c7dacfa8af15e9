"""`attend_with_sums` over slots that weigh: of one query from its attention, of more each sum on its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.attend import attend
from kernels.attend.rules import Rules
from kernels.attend.weighed import of_one_query as one_query
from kernels.mass.sums import Attended, Sums, of_one_query, summed


def attend_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rules: Rules,
    sums: Sequence[Sums],
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
) -> Attended:
    """What `kernels.mass.attend_with_sums` gives: attention is that of all logits, the bias among them."""
    if v is not None and all(one.plain for one in sums):
        both = one_query(q, k, v, rules, q_pos, k_pos, bias, factor)
        if both is not None:
            return both[0], [of_one_query(both[1], one, q_pos, k_pos) for one in sums]
    out = None if v is None else attend(q, k, v, rules, q_pos=q_pos, k_pos=k_pos, bias=bias, factor=factor)
    return out, [summed(q, k, rules, one, q_pos, k_pos, bias) for one in sums]
