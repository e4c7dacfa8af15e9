"""The definition of `mass`: rows of the softmax in blocks of queries, summed over the queries."""

import torch
from torch import Tensor

from kernels.attend import Rules
from kernels.attend.reference import logits

# query rows per block: their scores stay in the processor's cache (16 to 64 rows measured equal, 128 slower)
BLOCK_ROWS = 64


def attention_probs(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Attention probabilities [B, H, G, T, S], float32; for few queries. A query at -1 or that sees nothing gives 0."""
    p = logits(q, k, rules, q_pos, k_pos).softmax(-1)
    return p.nan_to_num(0.0)


def mass(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, plan: str = "positions") -> Tensor:
    """Attention that each slot receives from the queries, summed over them: [B, Hq, S], float32.

    q [B, Hq, T, D], k [B, H, S, D], q_pos [B, T], k_pos [B, H or 1, S]. A query with position -1 gives nothing.
    plan="tail": no slot is padding and the queries are the newest slots in order, so only the corner needs a mask.
    """
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, Hq // H, S, device=q.device)
    for i in range(0, T, BLOCK_ROWS):
        q_block, pos_block = q[:, :, i : i + BLOCK_ROWS], q_pos[:, i : i + BLOCK_ROWS]
        if plan == "tail" and rules.plain and rules.window is None:
            n = S - T + i + q_block.shape[2]  # slots that the block's last query sees
            out[..., :n] += _tail_rows(q_block, k[:, :, :n], rules.scale)
        else:
            out += attention_probs(q_block, k, rules, q_pos=pos_block, k_pos=k_pos).sum(dim=3)
    return out.view(B, Hq, S)


def _tail_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Column sums [B, H, G, S] of queries that are the newest T of the S slots."""
    B, _, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    x = ((q * scale).reshape(B, H, -1, D) @ k.transpose(-1, -2)).view(B, H, -1, T, S).float()
    corner = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    x[..., S - T :].masked_fill_(corner, -torch.inf)
    return x.softmax(-1).sum(dim=3)
