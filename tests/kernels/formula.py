"""Attention as it is written on paper, for tests that need the right answer."""

import math
from itertools import product

import torch
from torch import Tensor

from kernels import Rules
from tests.bounds import bound


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """The definition, one query and head at a time: softmax over exactly the slots that may be seen.

    bias, factor [B, H, S]: what is added to a slot's logits, and what multiplies its value.
    """
    q, k, v = q.double(), k.double(), v.double()
    B, Hq, T, _ = q.shape
    H = k.shape[1]
    out = torch.zeros(B, Hq, T, v.shape[-1], dtype=torch.float64)
    for b, h, t in product(range(B), range(Hq), range(T)):
        g = h // (Hq // H)
        slot_pos, at = k_pos[b, g if k_pos.shape[1] > 1 else 0].long(), int(q_pos[b, t])
        seen = (slot_pos >= 0) & (slot_pos <= at)
        if rules.window is not None:
            seen &= slot_pos > at - rules.window
        if at < 0 or not seen.any():
            continue
        x = k[b, g, seen] @ q[b, h, t] * rules.scale
        if rules.softcap is not None:
            x = rules.softcap * torch.tanh(x / rules.softcap)
        if rules.slopes is not None:
            x = x - rules.slopes[h].double() * (at - slot_pos[seen])
        if bias is not None:
            x = x + bias[b, g, seen].double()
        p = x.softmax(-1) if factor is None else x.softmax(-1) * factor[b, g, seen].double()
        out[b, h, t] = p @ v[b, g, seen]
    return out


def logits(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
    """What the softmax is taken of, [B, Hq, T, S] in float64, and which slots each query sees."""
    Hq = q.shape[1]
    k = k.double().repeat_interleave(Hq // k.shape[1], dim=1)
    k_pos = k_pos.expand(q.shape[0], -1, -1).repeat_interleave(Hq // k_pos.shape[1], dim=1)
    x = q.double() @ k.mT * rules.scale
    if rules.softcap is not None:
        x = rules.softcap * torch.tanh(x / rules.softcap)
    back = q_pos[:, None, :, None] - k_pos[:, :, None]
    if rules.slopes is not None:
        x = x - rules.slopes.double()[:, None, None] * back
    seen = (back >= 0) & (k_pos >= 0)[:, :, None]
    return x, seen if rules.window is None else seen & (back < rules.window)


#: the largest Gumbel noise that a uniform number of 23 bits becomes
NOISIEST = 24 * math.log(2)


def largest_logit(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, noisy: bool = False) -> float:
    """Largest |logit| among the slots that get a share of some query's attention above rounding; 1 where none is seen.

    noisy: Gumbel noise is added to the logits.
    """
    x, seen = logits(q, k, rules, q_pos, k_pos)
    if noisy:
        return x[seen].abs().max().item() + NOISIEST if seen.any() else 1.0
    x = x.masked_fill(~seen, -torch.inf)
    counted = x > x.amax(-1, keepdim=True) - 40.0  # the others' weights are below exp(-40)
    return x[counted].abs().max().item() if counted.any() else 1.0


def allowed(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    size: float | Tensor = 1.0,
    *,
    dtype: torch.dtype | None = None,
    scores: torch.dtype | None = None,
    noisy: bool = False,
) -> float:
    """What `bound` allows an output of attention, or a sum of it over the queries.

    size: the largest value, or the largest sum, or what holds them.  dtype: of the result; None: q's.
    scores: the logits'.
    """
    size = size.abs().max().item() if isinstance(size, Tensor) else size
    logit = largest_logit(q, k, rules, q_pos, k_pos, noisy)
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    return bound(dtype or q.dtype, max(T, S), logit, size=size, width=D, scores=scores)
