"""How a budget becomes slots per layer and head."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels import top
from methods.core.store import Store


class Allocator(ABC):
    """Spreads a budget over layers and heads: `method.allocator` names a subclass."""

    #: all heads of a layer keep the same number of slots
    even: ClassVar[bool] = True

    def slots(self, layer: int, n_layers: int, n: int) -> int:
        """Slots for this layer when the uniform share is n per head."""
        return n

    @abstractmethod
    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        """Keep-mask [B, H, S] of scores [B, H, S]: n [B] slots per head on average, the best ones."""

    def new_store(self, capacity: int | None) -> Store:
        """Storage that fits what `pick` leaves: the same number per head lies in a rectangle."""
        return Store(capacity)


@dataclass
class Uniform(Allocator):
    """The same number of slots in every layer and head."""

    def pick(self, scores: Tensor, n: Tensor) -> Tensor:
        return top(scores, n[:, None])
