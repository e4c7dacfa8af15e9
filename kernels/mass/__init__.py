"""Attention probabilities and their column sums, without an [n, n] matrix.

q [B, Hq, T, D], k [B, H, S, D], v [B, H, S, Dv]; positions as in `attend`: q_pos [B, T], k_pos [B, H or 1, S], int, -1
for padding. A query that sees nothing gives nothing. layout="tail": no slot is padding and the queries are the newest
slots in order; "positions" is always right. Sums over the last w queries are those of q[:, :, -w:], q_pos[:, -w:].
"""

from torch import Tensor

from kernels.attend.rules import Rules
from kernels.backend import on_triton
from kernels.mass import compiled, noisy, reference, weighted
from kernels.mass.reference import attention_probs
from kernels.mass.weighted import ema_weights
from kernels.noise import Stem


def mass(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, layout: str = "positions") -> Tensor:
    """Attention that each slot receives from the queries, summed over them: [B, Hq, S], float32."""
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout)
    return reference.mass(q, k, rules, q_pos=q_pos, k_pos=k_pos, layout=layout)


def weighted_mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    weights: Tensor | None = None,
    squared: bool = False,
    layout: str = "positions",
) -> Tensor:
    """Sums of weight times attention, or times its square, over the queries: [B, Hq, S], float32.

    weights: float32 per query, [B or 1, T]; None: 1 each. `ema_weights` makes an exponential moving average of it.
    """
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout, weights=weights, squared=squared)
    return weighted.weighted_mass(q, k, rules, q_pos, k_pos, weights, squared)


def noisy_mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    stem: Stem | None,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    tau: float | Tensor = 1.0,
    layout: str = "positions",
) -> Tensor:
    """Rows softmax((logits + Gumbel noise) / tau) summed over the queries: [B, Hq, S], float32.

    stem: keys of the noise up to the slots' positions, state [B, Hq, T or 1]; None: no noise. tau: above 0, one for all
    or per query, [B, T].
    """
    if on_triton(q.detach(), k.detach()):
        from kernels.mass import triton

        return triton.mass(q, k, rules, q_pos, k_pos, layout, stem=stem, tau=tau)
    return noisy.noisy_mass(q, k, rules, stem, q_pos, k_pos, tau, layout)


def attend_with_mass(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, n: int, *, q_pos: Tensor, k_pos: Tensor, layout: str = "positions"
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and `mass` of the newest n of the queries, computed together."""
    if on_triton(q, k, v):
        from kernels.mass import triton

        return triton.attend_with_mass(q, k, v, rules, n, q_pos, k_pos, layout)
    if compiled.serves(q, k, v, rules, n, layout):
        return compiled.attend_with_mass(q, k, v, rules)
    return reference.attend_with_mass(q, k, v, rules, n, q_pos=q_pos, k_pos=k_pos, layout=layout)


__all__ = ["attend_with_mass", "attention_probs", "ema_weights", "mass", "noisy_mass", "weighted_mass"]
