"""H2O: keep the tokens that have collected the most attention, and the newest.

Paper: Zhang et al. 2023, arXiv:2306.14048, section 4 and Algorithm 1.
Idea:  attention adds up on few tokens, the heavy hitters. Each slot's attention is summed over all queries that saw
       it; half of the cache is the newest tokens, the other half the largest sums. Once when the prompt ends, then one
       token per step: generated tokens add their attention and compete for the same slots.
Here:  true eviction while decoding, as in the release's real-drop code; its masks show a window that is a token short,
       and their whole-prompt form lets later queries score. Query heads that share a KV head add their attention. Keys
       keep the positions they were read at. The prompt attends in full before the first drop (evict=per_chunk, in
       chunks of one token, is the paper's streaming form).
"""

from dataclasses import dataclass

from torch import Tensor

from methods.core.capped import Capped, whole_slots
from methods.core.contract import Step
from methods.core.errors import UserError
from methods.core.eviction import EvictionContext
from methods.core.store import Store


@dataclass
class H2O(Capped):
    """A cache of fixed size: heavy hitters and recent tokens.

    heavy: share of the budget for heavy hitters, cut to whole slots; the rest is recent.
    normalise: compare a slot's attention per query that saw it, not its sum.
    """

    heavy: float = 0.5
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.heavy <= 1:
            raise UserError(f"H2O: method.heavy={self.heavy}; it is a share of the budget in [0, 1]")

    def n_window_queries(self, store: Store, step: Step) -> int:
        return 0 if self.request.is_off else step.q.shape[2]

    def observe(self, store: Store, step: Step, mass: Tensor | None) -> None:
        """Add the attention of the step's queries to what the slots have collected."""
        if mass is not None:
            B, H, S = store.pos.shape
            store.add("mass", mass.view(B, H, -1, S).sum(dim=2))

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Collected attention."""
        collected = store.track("mass")
        if self.normalise:
            collected = collected / (step.pos[:, -1:, None] - store.pos + 1).clamp_min(1)
        return collected

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest."""
        recent = cut.budget_slots - whole_slots(self.heavy, cut.budget_slots)
        return store.pos > step.pos[:, -1:, None] - recent
