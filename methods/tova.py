"""TOVA: drop the token that the newest query attends to least.

Paper: Oren et al. 2024, arXiv:2401.06104 (Transformers are Multi-State RNNs).
Idea:  a cache is the bounded state of a recurrent network. When it overflows, the last query's attention, averaged over
       all heads, says which tokens stay: no history, no recent window, no first tokens, one set for the whole layer.
       Once when the prompt ends, then one token per step, which may be the newest itself.
Here:  query heads are averaged directly, whatever KV head they share. granularity=kv_head lets each KV head choose with
       the mean of its own group. A sliding layer first lets go of what no later query sees.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.core.capped import Capped
from methods.core.contract import Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import EvictionContext
from methods.core.store import Store


@dataclass
class TOVA(Capped):
    """A cache of fixed size, filled by the attention of the last query.

    granularity: "layer": one set for all heads; "kv_head": one per KV head.
    protect_last: the newest token always stays.
    """

    granularity: str = "layer"
    protect_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("layer", "kv_head"):
            raise UserError(f"TOVA: method.granularity={self.granularity}; it is layer or kv_head")

    def n_window_queries(self, store: Store, step: Step) -> int:
        if self.request.is_off or (step.stage is Stage.MID_PROMPT and not self.changes_prompt):
            return 0
        return 1

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The last query's attention, averaged over heads."""
        B, H, S = store.pos.shape
        mass = cut.mass
        if mass is None or mass.shape[-1] != S:  # a sliding layer let go of slots after it attended
            mass = store.mass(step, 1)
        groups = 1 if self.granularity == "layer" else H
        row = mass.view(B, groups, -1, S).mean(dim=2).expand(B, H, S)
        return row

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor | None:
        """None, or the newest."""
        return store.pos == step.pos[:, -1:, None] if self.protect_last else None
