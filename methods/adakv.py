"""AdaKV: within a layer, heads that attend widely get slots from heads that attend to little.

Paper: Feng et al. 2024, arXiv:2407.11550.
Idea:  an allocator for any scores that can be compared between heads, such as SnapKV's. The layer's slots go to
       its best scores, whichever head they belong to, and a head's count is drawn back by a share `alpha` towards the
       even split, so that no head is left with next to nothing. Inside a head the best scores stay, as before. What
       stays in any case (SnapKV's window) is every head's, beside what is shared out. Once, when the prompt ends.
Here:  counts are whole slots whose sum is exactly the layer's (largest remainder, the lower head first); the release
       rounds every head for itself (safeguard=release) and misses the sum by up to half a slot per head. Some
       re-implementations reserve the floor first and share out the rest (safeguard=reserve). KV heads share, by scores
       that SnapKV pools and then averages over the query heads; the release averages first. Its options to scale a
       head's scores by their concentration and to leave layers out are not here. A head's slots lie in pages of 16; up
       to 15 unused places of its last page count as held and as overhead documented on top.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import top
from methods.core.allocate import Allocator
from methods.core.errors import UserError
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore

SAFEGUARDS = ("blend", "reserve", "release")
# fractions of slots that differ by less are equal: 0.2 * 3 + 0.8 * 3 is not 3 in binary
STEP = 2.0**-20


@dataclass
class AdaKV(Allocator):
    """Different numbers of slots per head, for the same sum.

    alpha: share of its even part that a head is sure of; 1 splits evenly, 0 takes the layer's best.
    safeguard: "blend": between the even count and the layer's; "release": so, each head rounded for itself;
        "reserve": the floor's slots first, then the layer's best of the rest.
    """

    even: ClassVar[bool] = False

    alpha: float = 0.2
    safeguard: str = "blend"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"AdaKV: method.allocator.alpha={self.alpha}; it is a share in [0, 1]")
        if self.safeguard not in SAFEGUARDS:
            raise UserError(f"AdaKV: method.allocator.safeguard={self.safeguard}; it is one of {', '.join(SAFEGUARDS)}")

    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        """Keep-mask [B, H, S] of scores [B, H, S]: n [B] slots times the heads of a row, those at +inf among them."""
        always = scores == torch.inf
        others = scores.masked_fill(always, -torch.inf)
        even = (n[:, None] - always.sum(-1)).clamp_min(0)  # [B, H], beside what stays in any case
        if self.safeguard == "reserve":
            floor = top(others, self._floor(even).long())
            return always | best(others.masked_fill(floor, torch.inf), even.sum(-1))
        return always | top(others, self.counts(even, best(others, even.sum(-1)).sum(-1)))

    def counts(self, even: Tensor, of_layer: Tensor) -> Tensor:
        """Whole slots per head, between the even split and the heads' parts of the layer's best, all [B, H]."""
        drawn = (1 - self.alpha) * of_layer.double()
        if self.safeguard == "release":
            return (self._floor(even) + drawn).round().long()
        exact = self.alpha * even.double() + drawn
        whole = (exact + STEP).floor()
        remainder = ((exact - whole) / STEP).round()  # [B, H]
        return (whole + top(remainder, even.sum(-1) - whole.sum(-1))).long()

    def new_store(self, capacity: int | None) -> Store:
        """Pages, so that what a head gives up is freed and not padded."""
        return RaggedStore(capacity)

    def _floor(self, even: Tensor) -> Tensor:
        return (self.alpha * even.double()).floor()


def best(scores: Tensor, n: Tensor) -> Tensor:
    """Keep-mask [B, H, S] of the n [B] best slots of all heads; at equal scores the lower head, then the lower slot."""
    return top(scores.flatten(1), n).view_as(scores)
