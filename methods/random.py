"""Random: keep slots drawn at random, the floor that every scoring rule must beat.

Paper: none; the usual control.
Idea:  a uniform number per slot is its score; layers and heads draw for themselves. Runs once, when the prompt ends.
Here:  numbers are keyed by (seed, sample, layer, head, position), so a result depends on nothing else. Nothing is
       protected, neither the first tokens nor the newest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import uniform
from methods.core.contract import Step
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store


@dataclass
class Random(Eviction):
    """Keep a uniform sample of the prompt's slots."""

    @property
    def family(self) -> str:
        return "baseline"

    def slots(self, n: int) -> int:
        return max(1, super().slots(n))

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Uniform numbers, [B, H, S]."""
        heads = torch.arange(store.pos.shape[1], device=store.pos.device)
        layer = torch.full_like(heads[:1], step.layer)
        return uniform(self.seed, step.samples[:, None, None], layer, heads[None, :, None], store.pos)
