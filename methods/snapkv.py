"""SnapKV: keep the prompt slots that the end of the prompt attends to.

Paper: Li et al. 2024, arXiv:2404.14469, section 4.
Idea:  the last `window` queries of the prompt, the observation window, score earlier slots by their attention; a
       pooling over neighbours keeps spans whole; the top slots and the window stay. Runs once, when the prompt ends;
       later tokens are appended.
Here:  query heads that share a KV head score together (pooled, then averaged), so a grouped-query model keeps its small
       cache; the authors' release lets every query head choose for itself. The paper's LongBench setting (max, 7) is
       the default, the release's is pooling=avg kernel=5. Never fewer than window + 1 slots stay.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import mass
from methods.core.contract import Step
from methods.core.errors import NotHere, UserError
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store


@dataclass
class SnapKV(Eviction):
    """Drop prompt slots once, by the attention of the last queries.

    window: queries that score, and newest slots kept without a score; tokens.
    kernel: width of the pooling over neighbouring slots; odd, 1 is none.
    pooling: "max" or "avg".
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(
                f"SnapKV: method.window={self.window}, method.kernel={self.kernel}; "
                "the window holds at least one token, and the kernel is odd so that it has a centre"
            )
        if self.pooling not in ("max", "avg"):
            raise UserError(f"SnapKV: method.pooling={self.pooling}; it is max or avg")
        if self.request.within(self.window) and self.pins.is_own:
            raise NotHere(
                f"SnapKV: {self.request} slots do not hold method.window={self.window} and one more; "
                "raise budget or lower method.window"
            )

    def query_window(self, n: int) -> int:
        return self.window

    @property
    def least(self) -> int:
        return self.window + 1

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Pooled scores per slot, [B, H, S]."""
        scores = self.window_scores(store, step, cut)  # [B, Hq, S]
        B, H, S = store.pos.shape
        outside = cut.age_rank < 0  # [B, H, S]
        if self.pins.is_own:
            outside = outside | self.protected(store, step, cut)
        else:  # the window's slots compete, by the mean of the fewer queries that see them
            scores = scores / self.seen_by(store, cut).repeat_interleave(scores.shape[1] // H, dim=1)
        outside = outside.repeat_interleave(scores.shape[1] // H, dim=1)  # [B, Hq, S]
        # neither the scores of a window that stays nor padding may leak into the slots beside them through the pooling
        scores = scores.masked_fill(outside, 0.0 if self.pooling == "avg" else -torch.inf)
        if store.padded or cut.again:  # padding may stand between a row's slots: they are neighbours all the same
            order = cut.real.to(torch.int8).argsort(dim=-1, stable=True).repeat_interleave(scores.shape[1] // H, dim=1)
            scores = torch.empty_like(scores).scatter_(2, order, self.pool(scores.gather(2, order)))
        else:
            scores = self.pool(scores)
        return scores.view(B, H, -1, S).mean(dim=2)  # [B, H, S]

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The window's own slots."""
        return cut.age_rank >= cut.n - self.window

    def seen_by(self, store: Store, cut: EvictionContext) -> Tensor:
        """How many of the window's queries come at or after each slot, [B, H, S], at least 1."""
        q_pos = cut.q_pos[:, -self.window :]  # [B, W]
        queries = (q_pos >= 0).sum(-1)[:, None, None]
        return (q_pos[:, -1, None, None] - store.pos + 1).minimum(queries).clamp_min(1)

    def window_scores(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Attention that the window's queries give every slot, [B, Hq, S]."""
        k, _ = store.read()  # [B, H, S, D]
        q, q_pos = cut.q[:, :, -self.window :], cut.q_pos[:, -self.window :]  # [B, Hq, W, D], [B, W]
        return mass(q, k, step.rules, q_pos=q_pos, k_pos=store.pos, layout=store.layout(q.shape[2]))

    def pool(self, scores: Tensor) -> Tensor:
        """Scores [B, Hq, S] smoothed over neighbours; ends count as zero (avg) or nothing (max)."""
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(scores, self.kernel, stride=1, padding=self.kernel // 2)
