"""What attention is told beside tensors: how a layer turns q·k into probabilities, and what is known of visibility."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

#: what the caller knows about visibility: `all` slots are seen by every query; `causal` means q and k are the same
#: unpadded tokens; `positions` compares q_pos with k_pos and is always right.
Layout = Literal["all", "causal", "positions"]


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
