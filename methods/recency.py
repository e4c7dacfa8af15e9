"""Recency: keep the newest slots, the null that knows nothing but a slot's age.

Paper: Garcia 2026, arXiv:2605.18053, whose least-recently-used baseline comes to this where no slot has been used.
Idea:  the position is the score. When the prompt ends, then at every step, the oldest slot that is not pinned goes.
Here:  with no pin it is the window (method=window), with the first four pinned StreamingLLM at original positions;
       method.pin=boundary pins both ends. The paper counts a slot as used when it is attended to, and breaks ties by
       the position as a text; here neither. method.decode.every=r cuts K + r slots down to K instead, as the paper does
       every 8 or 32 tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.core.capped import Capped
from methods.core.contract import Step
from methods.core.evicting.nulls import recency_scores
from methods.core.eviction import EvictionContext
from methods.core.store import Store


@dataclass
class Recency(Capped):
    """A cache of fixed size, filled by the newest."""

    @property
    def family(self) -> str:
        return "baseline"

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest first, [B, H, S]."""
        return recency_scores(store)
