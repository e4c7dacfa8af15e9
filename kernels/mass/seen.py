"""How many queries see a slot, and with it the moments of the attention that it gets."""

import torch
from torch import Tensor

from kernels.attend.rules import Rules


def seen_by(q_pos: Tensor, k_pos: Tensor, rules: Rules, weights: Tensor | None = None) -> Tensor:
    """How many of the queries at q_pos [B, T] see each slot at k_pos [B, H or 1, S], or what they weigh: float32.

    weights: per query, [B or 1, T]; None: 1 each. Padding sees nothing and is not seen.
    """
    B, H, S = k_pos.shape
    w = torch.ones_like(q_pos, dtype=torch.float64) if weights is None else weights.double().expand(q_pos.shape)
    last = int(torch.cat((q_pos.flatten(), k_pos.flatten())).amax()) + 1  # positions, waits for the device
    by_position = w.new_zeros(B, last + 1).scatter_add(1, q_pos.long() + 1, w * (q_pos >= 0))
    before = by_position.cumsum(1)  # weight of queries at positions below
    at = k_pos.clamp_min(0).long().flatten(1)  # [B, H * S]
    end = torch.full_like(at, last) if rules.window is None else (at + rules.window).clamp_max(last)
    seen = (before.gather(1, end) - before.gather(1, at)).view(B, H, S)
    return seen.masked_fill(k_pos < 0, 0.0).float()


def moments(total: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what n queries gave, from the sum and the sum of squares; 0 where there is none."""
    n = n.clamp_min(1)
    mean = total / n
    return mean, (squares / n - mean.square()).clamp_min(0)
