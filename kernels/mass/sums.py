"""What may be summed over the rows of attention, and the definition of such a sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attend.reference import logits
from kernels.attend.rules import Rules
from kernels.noise import Stem

# elements of one block's scores
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Sums:
    """A sum over queries of the attention that each slot receives: [B, Hq, S], float32.

    newest: over the newest so many queries; None: all.
    weights: float32 per query, [B or 1, T]; None: 1 each.
    squared: of the squares of attention.
    least, most: of slots that lie at least, and fewer than, so many positions before the query; most=None: all.
    stem: keys of Gumbel noise on the logits up to the slots' positions, state [B, Hq, T or 1]; None: no noise.
    tau: what the noisy logits are divided by, above 0, one for all or per query, [B, T].
    greatest: the greatest over the queries instead of the sum; weights are 0 or more.
    """

    newest: int | None = None
    weights: Tensor | None = None
    squared: bool = False
    least: int = 0
    most: int | None = None
    stem: Stem | None = None
    tau: float | Tensor = 1.0
    greatest: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is of the model's own attention."""
        return self.stem is None and isinstance(self.tau, (int, float)) and self.tau == 1


#: an output [B, Hq, T, Dv], where one is asked for, and sums [B, Hq, S]
Attended = tuple[Tensor | None, list[Tensor]]


def of_one_query(probs: Tensor, one: Sums, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """A sum without noise over the only query, whose attention is probs [B, Hq, S]."""
    p = probs.square() if one.squared else probs
    if one.least > 0 or one.most is not None:
        back = q_pos[:, :, None] - k_pos  # [B, H or 1, S]
        near = back >= one.least if one.most is None else (back >= one.least) & (back < one.most)
        p = p.unflatten(1, (near.shape[1], -1)).masked_fill(~near[:, :, None], 0.0).flatten(1, 2)
    return p if one.weights is None else p * one.weights[:, None]


def summed(
    q: Tensor, k: Tensor, rules: Rules, one: Sums, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None = None
) -> Tensor:
    """One sum, [B, Hq, S]; rows in blocks of queries. A query at -1 or that sees nothing gives nothing.

    bias: as in `attend`.
    """
    q, k = q.detach(), k.detach()
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    shape = B, H, Hq // H
    out = torch.zeros(*shape, S, device=q.device)
    slots = k_pos[:, :, None, None]  # [B, H or 1, 1, 1, S]
    rows = max(1, BLOCK_ELEMENTS // max(1, B * Hq * S))
    for i in range(0 if one.newest is None else T - one.newest, T, rows):
        now = slice(i, min(T, i + rows))
        x = logits(q[:, :, now], k, rules, q_pos[:, now], k_pos, bias)  # [B, H, G, t, S]
        if one.stem is not None:
            state = one.stem.state.view(*shape, -1, 1)
            part = Stem(state if state.shape[3] == 1 else state[:, :, :, now])
            x = x - (-part.log_uniform(slots)).log()
        tau = one.tau[:, None, None, now, None] if isinstance(one.tau, Tensor) else one.tau
        p = (x / tau).softmax(-1).nan_to_num(0.0)
        if one.squared:
            p = p.square()
        if one.least > 0 or one.most is not None:
            back = q_pos[:, None, None, now, None] - slots
            near = back >= one.least if one.most is None else (back >= one.least) & (back < one.most)
            p = p.masked_fill(~near, 0.0)
        p = p if one.weights is None else p * one.weights[:, None, None, now, None]
        if one.greatest:
            out = torch.maximum(out, p.amax(3))
        else:
            out += p.sum(3)
    return out.view(B, Hq, S)
