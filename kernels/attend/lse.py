"""The definition of the log-sum-exp of attention logits, in PyTorch: blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attend.reference import BLOCK_ELEMENTS, logits

if TYPE_CHECKING:
    from kernels.attend.rules import Rules


def log_sum_exp(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Of each query's logits over the slots that it sees, [B, Hq, T], float32; -inf where it sees none."""
    B, Hq, T, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * k.shape[2]))
    blocks = [
        logits(q[:, :, i : i + rows], k, rules, q_pos[:, i : i + rows], k_pos).logsumexp(-1).view(B, Hq, -1)
        for i in range(0, T, rows)
    ]
    return torch.cat(blocks, dim=2) if blocks else q.new_empty(B, Hq, 0, dtype=torch.float32)
