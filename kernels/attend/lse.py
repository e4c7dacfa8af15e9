"""The definition of the log-sum-exp of attention logits, in PyTorch: blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attend.reference import BLOCK_ELEMENTS, logits

if TYPE_CHECKING:
    from kernels.attend.rules import Rules


def merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """One softmax over two sets of slots, from the output [B, Hq, T, Dv] and log-sum-exp [B, Hq, T] of each."""
    most = torch.maximum(lse_a, lse_b)
    most = torch.where(most == -torch.inf, 0.0, most)  # a query that sees nothing in either
    wa, wb = (lse_a - most).exp()[..., None], (lse_b - most).exp()[..., None]
    total = wa + wb
    return ((a.float() * wa + b.float() * wb) / torch.where(total == 0, 1, total)).to(a.dtype)


def log_sum_exp(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of each query's logits over the slots that it sees, [B, Hq, T], float32; -inf where it sees none."""
    B, Hq, T, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * k.shape[2]))
    blocks = [
        logits(q[:, :, i : i + rows], k, rules, q_pos[:, i : i + rows], k_pos, bias).logsumexp(-1).view(B, Hq, -1)
        for i in range(0, T, rows)
    ]
    return torch.cat(blocks, dim=2) if blocks else q.new_empty(B, Hq, 0, dtype=torch.float32)
