"""Attention of new queries over stored slots.

Layouts: q [B, Hq, T, D]; k [B, H, S, D]; v [B, H, S, Dv]; Hq is a multiple of H and query head h reads KV head
h // (Hq // H). Positions are the tokens' own, int, -1 for padding: q_pos [B, T]; k_pos [B, H or 1, S].
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.attend import reference
from kernels.attend.reference import visible

#: what the caller knows about visibility: `all` slots are seen by every query; `causal` means q and k are the same
#: unpadded tokens; `positions` compares q_pos with k_pos and is always right.
Plan = Literal["all", "causal", "positions"]


@dataclass(frozen=True)
class Rules:
    """How one layer of the model turns q·k into probabilities.

    scale: factor on q·k.  softcap: bound c of c·tanh(x/c), or None.  window: a query sees keys less than this many
    tokens back, or None.  slopes: ALiBi slope per query head, [Hq], or None.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    slopes: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether softmax(scale · q·k) is all there is to it."""
        return self.softcap is None and self.slopes is None


def attend(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, plan: Plan = "positions"
) -> Tensor:
    """Attention output [B, Hq, T, Dv] in q's dtype; rows that see no slot give 0."""
    if plan == "all" and rules.plain:
        return reference.attend_all(q, k, v, rules)
    if plan == "causal" and rules.plain:
        return reference.attend_causal(q, k, v, rules)
    return reference.attend_positions(q, k, v, rules, q_pos, k_pos)


__all__ = ["Plan", "Rules", "attend", "visible"]
