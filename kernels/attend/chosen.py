"""Attention over slots that are chosen for each head: what methods do that read some of what they hold."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reads
from kernels.attend import attend
from kernels.attend.rules import Rules


@reads.counted(reads.chosen)
def attend_chosen(q: Tensor, k: Tensor, v: Tensor, at: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Attention output [B, Hq, T, Dv] in q's dtype over some of the slots; queries that see none of them give 0.

    at [B, Hq or H, n]: the slots that all queries of a query head, or of a KV head's group, attend to, each once,
    -1: no slot. q [B, Hq, T, D], k [B, H, S, D], v [B, H, S, Dv]; q_pos [B, T], k_pos [B, H or 1, S] as in `attend`.
    """
    (B, H), heads = k.shape[:2], at.shape[1]
    # [B, H, heads / H * n]: the choices of a KV head's query heads side by side
    here = at.clamp_min(0).view(B, H, -1)
    k, v = (_gather(x, here).view(B, heads, -1, x.shape[-1]) for x in (k, v))
    pos = k_pos.expand(B, H, -1).gather(2, here).view(B, heads, -1).masked_fill(at < 0, -1)
    return attend(q, k, v, rules, q_pos=q_pos, k_pos=pos)


def _gather(x: Tensor, at: Tensor) -> Tensor:
    """x [B, H, S, D] at [B, H, n]: [B, H, n, D]."""
    return torch.gather(x, 2, at[..., None].expand(*at.shape, x.shape[-1]))
