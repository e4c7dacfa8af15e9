"""The full cache: keeps everything in full precision, the reference point of every plot.

Paper: none; this is the model as its authors run it.
Idea:  nothing is dropped.
Here:  sliding-window layers let go of what no later query can see, as the stock cache does.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.core.contract import Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store


@dataclass
class Full(Eviction):
    """Keep every slot; budget is always 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1:
            raise UserError(f"Full: method.budget={self.budget}; the full cache keeps everything, budget=1")

    @property
    def family(self) -> str:
        return "baseline"

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Never called: at budget 1 nothing has to go."""
        raise AssertionError("the full cache dropped a slot")
