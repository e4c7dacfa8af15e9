"""`attend` over slots in 16 bits under float32 queries, on a CPU: which of the C++ forms takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attend import compiled, reference
from kernels.attend.pages import Pages

if TYPE_CHECKING:
    from kernels.attend.rules import Layout, Rules


def attend(q: Tensor, k: Tensor, v: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, layout: Layout) -> Tensor:
    """What `kernels.attend.attend` gives; arithmetic is q's. Nothing of the slots' size is made in another type."""
    from kernels.mass import compiled as one_token  # at call time: sums of attention are built on attention
    from kernels.mass import rows

    if layout == "all" and one_token.serves(q, k, v, rules, 1, "tail"):
        return one_token.attend_with_mass(q, k, v, rules)[0]
    if q.shape[2] == 1:
        tail = k, v, k_pos.expand(-1, k.shape[1], -1).to(torch.int32)
        pages = Pages.none(k, v)
        if compiled.serves(q, pages, tail, rules):
            return compiled.attend_pages(q, pages, tail, rules, q_pos)[0]
    if rows.serves(q, k, v, rules):
        how = "tail" if layout == "causal" else "positions"
        out = rows.attend_with_sums(q, k, v, rules, [], q_pos, k_pos, how)[0]
        assert out is not None
        return out
    return reference.attend_positions(q, k, v, rules, q_pos, k_pos)
