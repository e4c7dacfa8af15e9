"""Methods that hold every slot and attend to those that a step's queries pick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.core.contract import Method
from methods.core.errors import UserError

TURNS = ("per_token", "shared", "dense")


@dataclass
class Selective(Method):
    """Reads less than it holds: from the prompt's end on queries attend to the slots that they pick.

    budget: share of the full cache's bytes that a step may read, in (0, 1], or the bytes of a number of its slots.
    turn: what the tokens of a later turn read: per_token, each picks for itself, one after the other, as it would while
    decoding; shared, one pick for all of them; dense, everything.
    dense_layers: so many first layers always attend to everything.
    """

    turn: str = "per_token"
    dense_layers: int = 0

    binds: ClassVar[str] = "read"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turn not in TURNS:
            raise UserError(f"{self.name}: method.turn={self.turn}; it is one of {', '.join(TURNS)}")
        if isinstance(self.dense_layers, bool) or not isinstance(self.dense_layers, int) or self.dense_layers < 0:
            raise UserError(f"{self.name}: method.dense_layers={self.dense_layers}; give a number of layers, 0 or more")

    @property
    def family(self) -> str:
        return "selection"
