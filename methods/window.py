"""Window: keep the newest tokens and nothing else.

Paper: Beltagy et al. 2020, arXiv:2004.05150, section 3.1; its sliding window is the usual baseline of eviction papers.
Idea:  once when the prompt ends, then at every step, the oldest token goes.
Here:  the window is the budget, so that it compares with other methods; keys keep the positions they were read at. The
       prompt attends in full before the first drop (evict=per_chunk slides inside it too).
"""

from dataclasses import dataclass

from torch import Tensor

from methods.core.capped import Capped
from methods.core.contract import Step
from methods.core.eviction import EvictionContext
from methods.core.store import Store


@dataclass
class Window(Capped):
    """A recent window of fixed size."""

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest first."""
        return store.pos.float()
