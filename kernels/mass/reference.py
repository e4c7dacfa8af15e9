"""The definition of `mass`: rows of the softmax in blocks of queries, summed over the queries."""

import torch
from torch import Tensor

from kernels.attend import Rules
from kernels.attend.reference import logits

# query rows per block: their scores stay in the processor's cache (of 8 to 64 rows, 16 measured fastest)
BLOCK_ROWS = 16


def attention_probs(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Attention probabilities [B, H, G, T, S], float32; for few queries. A query at -1 or that sees nothing gives 0."""
    p = logits(q, k, rules, q_pos, k_pos).softmax(-1)
    return p.nan_to_num(0.0)


def mass(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, plan: str = "positions") -> Tensor:
    """Attention that each slot receives from the queries, summed over them: [B, Hq, S], float32.

    q [B, Hq, T, D], k [B, H, S, D], q_pos [B, T], k_pos [B, H or 1, S]. A query with position -1 gives nothing.
    plan="tail": no slot is padding and the queries are the newest slots in order, so only the corner needs a mask.
    """
    if plan == "tail" and rules.plain and rules.window is None:
        return _tail_mass(q, k, rules.scale)
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, Hq // H, S, device=q.device)
    for i in range(0, T, BLOCK_ROWS):
        rows = slice(i, i + BLOCK_ROWS)
        out += attention_probs(q[:, :, rows], k, rules, q_pos=q_pos[:, rows], k_pos=k_pos).sum(dim=3)
    return out.view(B, Hq, S)


def _tail_mass(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Column sums [B, Hq, S] of queries that are the newest T of the S slots; two buffers serve all blocks."""
    B, Hq, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    G = Hq // H
    out = torch.zeros(B * Hq, S, device=q.device)
    k_t = k.transpose(-1, -2).reshape(B * H, D, S)
    q = (q * scale).reshape(B, H, G, T, D)
    scores, probs = (torch.empty(B * Hq * BLOCK_ROWS * S, dtype=kind, device=q.device) for kind in (q.dtype, out.dtype))
    for i in range(0, T, BLOCK_ROWS):
        t = min(BLOCK_ROWS, T - i)
        n = S - T + i + t  # slots that the block's last query sees
        x = scores[: B * Hq * t * n].view(B * H, G * t, n)
        torch.bmm(q[:, :, :, i : i + t].reshape(B * H, G * t, D), k_t[:, :, :n], out=x)
        x = x.view(B * Hq, t, n)
        x[..., n - t :].masked_fill_(torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        p = probs[: x.numel()].view(x.shape)
        torch.softmax(x, -1, dtype=out.dtype, out=p)
        out[:, :n] += p.sum(dim=1)
    return out.view(B, Hq, S)
