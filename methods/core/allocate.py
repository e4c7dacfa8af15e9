"""How a budget becomes slots per layer and head."""

from dataclasses import dataclass

from torch import Tensor

from kernels import top
from methods.core.store import Store


@dataclass
class Uniform:
    """The same number of slots in every layer and head."""

    def slots(self, layer: int, n_layers: int, n: int) -> int:
        """Slots for this layer when the uniform share is n per head."""
        return n

    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        """Keep-mask [B, H, S] of scores [B, H, S]: the best n [B] slots of every head."""
        return top(scores, n[:, None])

    def new_store(self, capacity: int | None) -> Store:
        """Storage that fits what `pick` leaves: the same number per head lies in a rectangle."""
        return Store(capacity)
