"""The definition of `weighted_mass`: rows of the softmax in blocks of queries, weighted and summed."""

import torch
from torch import Tensor

from kernels.attend.rules import Rules
from kernels.mass.reference import attention_probs

# elements of one block's scores
BLOCK_ELEMENTS = 1 << 20


def ema_weights(T: int, decay: float, device: torch.device | None = None) -> Tensor:
    """Weights [1, T] that make the sum over T queries the end of s = decay * s + (1 - decay) * p, begun at s = 0.

    What stood before the queries is worth decay ** T of itself afterwards.
    """
    age = torch.arange(T - 1, -1, -1, device=device, dtype=torch.float32)
    return (1 - decay) * decay ** age[None]


def weighted_mass(
    q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, weights: Tensor | None, squared: bool
) -> Tensor:
    """Sums of weight times attention, or times its square, over the queries: [B, Hq, S], float32."""
    q, k = q.detach(), k.detach()
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, Hq // H, S, device=q.device)
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * S))
    for i in range(0, T, rows):
        p = attention_probs(q[:, :, i : i + rows], k, rules, q_pos=q_pos[:, i : i + rows], k_pos=k_pos)
        if squared:
            p = p.square_()
        w = p.new_ones(1, p.shape[3]) if weights is None else weights[:, i : i + rows]
        out += (w[:, None, None, None] @ p).squeeze(3)  # [B or 1, 1, 1, 1, t] @ [B, H, G, t, S]
    return out.view(B, Hq, S)
