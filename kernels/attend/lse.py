"""The definition of the log-sum-exp of attention logits, in PyTorch: blocks of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attend.reference import BLOCK_ELEMENTS, logits

if TYPE_CHECKING:
    from kernels.attend.rules import Rules


def merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """One softmax over two sets of slots, from the output [B, Hq, T, Dv] and log-sum-exp [B, Hq, T] of each."""
    return merged_all([(a, lse_a), (b, lse_b)])[0]


def merged_all(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over sets of slots, from each one's output and log-sum-exp: output, and log-sum-exp of all.

    Arithmetic is in float32; the output has the type of the first.
    """
    lse = torch.stack([one for _, one in parts])  # [n, B, Hq, T]
    most = lse.amax(0)
    most = torch.where(most == -torch.inf, 0.0, most)  # a query that sees nothing in any
    weights = (lse - most).exp()
    total = weights.sum(0)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for (x, _), weight in zip(parts, weights, strict=True):
        out += x.float() * weight[..., None]
    out /= torch.where(total == 0, 1, total)[..., None]
    return out.to(parts[0][0].dtype), most + total.log()


def log_sum_exp(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of each query's logits over the slots that it sees, [B, Hq, T], float32; -inf where it sees none."""
    B, Hq, T, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * k.shape[2]))
    blocks = [
        logits(q[:, :, i : i + rows], k, rules, q_pos[:, i : i + rows], k_pos, bias).logsumexp(-1).view(B, Hq, -1)
        for i in range(0, T, rows)
    ]
    return torch.cat(blocks, dim=2) if blocks else q.new_empty(B, Hq, 0, dtype=torch.float32)
