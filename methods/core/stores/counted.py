"""How many slots the rows of a store hold, and what bytes these come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from methods.core.contract import Holding


class Counted:
    """The accounts of a store: slots by row and bytes by row, of what lies in its buffers.

    Both are known along the way wherever they can be, so that no device is waited for.
    """

    def __init__(self) -> None:
        self.n = 0  # places in use
        self.padded = False  # whether any place in use is padding
        self.buffers: dict[str, Tensor] = {}  # "k", "v", "pos" and the side arrays, slots on dimension 2
        self.free_slot: Tensor | None = None  # [B, H], one of every head, freed, that the next token takes
        self.real: list[int] | None = None  # slots of every row, over all its heads; None: to be counted
        self.whole: list[bool] | None = None  # rows that have dropped nothing; None: as positions are held
        self._sizes: tuple[tuple[Any, ...], tuple[int, int, int]] = ((), (0, 0, 0))  # of which arrays, and of a slot

    @property
    def k(self) -> Tensor:
        """Keys of the slots in use, [B, H, S, D], as they are held."""
        return self.buffers["k"][:, :, : self.n]

    @property
    def pos(self) -> Tensor:
        """Positions of the slots in their rows, [B, H, S], int32, -1 for padding."""
        return self.buffers["pos"][:, :, : self.n].expand(-1, self.k.shape[1], -1)

    def count(self, of_rows: Sequence[int]) -> None:
        """What every head of a row holds now, where the caller knows it and the store does not."""
        if self.real is None:
            self.real = [self.k.shape[1] * n for n in of_rows]

    def lose(self, rows: Sequence[bool]) -> None:
        """Slots of these rows go. The others hold what they hold alone: positions once for all their heads."""
        self.whole = [not lost and whole for lost, whole in zip(rows, self.whole or [True] * len(rows), strict=True)]

    def counted(self) -> list[int]:
        """Slots of every row, over all its heads; waits for the device where they could not be counted along."""
        if self.real is None:
            B, H = self.k.shape[:2]
            plain = not self.padded and self.free_slot is None
            self.real = [H * self.n] * B if plain else (self.pos >= 0).sum((1, 2)).tolist()
        return self.real

    def holding(self, visible: int | None = None) -> Holding:
        """Bytes by row: keys, values and, on top of the budget, positions and side arrays of slots.

        visible: slots of a head that later queries can see.
        """
        if not self.buffers:
            return Holding([], [], [])
        whole = sum(x.nbytes for x in self.buffers.values()) // len(self.k)
        kv, _, _ = self._per_slot()
        slots = self._visible(visible)
        beside, as_they_lie = self._beside(slots), self._beside(slots, alone=False)
        held = [n * kv + more for n, more in zip(slots, beside)]
        return Holding(held, beside, [whole - n for n in held], [b - a for a, b in zip(beside, as_they_lie)])

    def held_bytes(self, visible: int | None = None) -> list[int]:
        """What `holding` gives as held."""
        if not self.buffers:
            return []
        kv, _, _ = self._per_slot()
        slots = self._visible(visible)
        return [n * kv + more for n, more in zip(slots, self._beside(slots))]

    def overhead(self) -> int:
        """Bytes beside the slots' keys and values: positions, side arrays, padding and free places."""
        return self.holding().overhead()

    def _visible(self, visible: int | None) -> list[int]:
        """Slots of every row, over all its heads, of each head at most so many."""
        H = self.buffers["k"].shape[1]
        return self.counted() if visible is None else [min(n, H * visible) for n in self.counted()]

    def _beside(self, slots: Sequence[int], alone: bool = True) -> list[int]:
        """Bytes of positions and side arrays of so many slots of every row, over all its heads.

        alone: in a row that has dropped nothing, as it holds them alone; else as they lie.
        """
        H, (_, side, pos) = self.k.shape[1], self._per_slot()
        lie = [self.buffers["pos"].shape[1] == 1] * len(slots)
        shared = self.whole if alone and self.whole is not None else lie
        return [n * side + (n // H if once else n) * pos for n, once in zip(slots, shared)]

    def _per_slot(self) -> tuple[int, int, int]:
        """Bytes of a head's slot: in keys and values, in side arrays, and of its position."""
        if self._sizes[0] != (names := tuple(self.buffers)):  # asked for after every pass
            size = {name: x.element_size() * math.prod(x.shape[3:]) for name, x in self.buffers.items()}
            kv, pos = size.pop("k") + size.pop("v"), size.pop("pos")
            self._sizes = names, (kv, sum(size.values()), pos)
        return self._sizes[1]

    def _count_in(self, k: Tensor, padded: bool) -> None:
        """New tokens k [B, H, T, D] of every row."""
        B, H, T = k.shape[:3]
        if padded:
            self.real = None
        elif not self.buffers:
            self.real = [H * T] * B
        elif self.real is not None:
            self.real = [n + H * T for n in self.real]

    def _count_out(self, slot: Tensor, rows: Sequence[bool] | None) -> None:
        if self.real is not None:
            lose = [True] * len(self.real) if rows is None else rows
            self.real = [n - slot.shape[1] * loses for n, loses in zip(self.real, lose, strict=True)]
