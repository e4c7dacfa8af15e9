"""Output with the log-sum-exp of its logits, defined in PyTorch in blocks of queries; and merging several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attend.reference import BLOCK_ELEMENTS, averages, logits

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


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `kernels.attend.attend_with_lse` gives, both from one product q·k."""
    B, Hq, T, _ = q.shape
    H = k.shape[1]
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * k.shape[2]))
    out, lse = q.new_empty(B, Hq, T, v.shape[-1]), q.new_empty(B, Hq, T, dtype=torch.float32)
    for i in range(0, T, rows):
        now = slice(i, i + rows)
        x = logits(q[:, :, now], k, rules, q_pos[:, now], k_pos, bias)  # [B, H, G, t, S]
        total = x.logsumexp(-1)
        base = torch.where(total == -torch.inf, 0.0, total)  # a query that sees nothing
        p = (x - base[..., None]).exp()
        if factor is not None:
            p = p * factor[:, :, None, None]
        part = averages(p.to(q.dtype).view(B, H, -1, p.shape[-1]), v)
        out[:, :, now], lse[:, :, now] = part.view(B, Hq, -1, v.shape[-1]), total.view(B, Hq, -1)
    return out, lse
