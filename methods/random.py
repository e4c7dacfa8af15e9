"""Random: keep slots drawn at random, the floor that every scoring rule must beat.

Paper: none; the usual control.
Idea:  a uniform number per slot is its score; layers and heads draw for themselves. Runs once, when the prompt ends.
Here:  numbers are keyed by (seed, sample, layer, head, position), so a result depends on nothing else. Nothing is
       protected, neither the first tokens nor the newest (method.pin=boundary protects both). method.decode.every=r
       also cuts K + r slots down to K while decoding: what is held is then a uniform sample of all tokens so far, or,
       with method.draw=fresh, which draws anew at every cut, favours the newer ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.core.contract import Step
from methods.core.evicting.nulls import random_scores
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store


@dataclass
class Random(Eviction):
    """Keep a uniform sample of the prompt's slots."""

    draws: ClassVar[bool] = True

    @property
    def family(self) -> str:
        return "baseline"

    @property
    def least(self) -> int:
        return 1

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Uniform numbers, [B, H, S]."""
        return random_scores(self.seed, store, step, cut, self.draw)
