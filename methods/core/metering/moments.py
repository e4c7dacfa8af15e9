"""What rows hold at a moment of their sequences, and how bytes that nobody owns are shared out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


def nbytes(tensors: Iterable[Tensor], billed: set[int] | None = None) -> int:
    """Bytes of the storages behind the tensors, each storage once: a small view counts what it keeps alive.

    billed: storages that somebody else pays for; those that are counted here come to them.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    if billed is None:
        return sum(storages.values())
    new = storages.keys() - billed
    billed |= new
    return sum(storages[one] for one in new)


@dataclass
class Moment:
    """What own slots of every row hold when a pass is done, and their tokens so far."""

    held: list[int]
    tokens: list[int]

    def choose(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self.held, self.tokens = ([numbers[row] for row in rows] for numbers in (self.held, self.tokens))


@dataclass
class PromptEnd(Moment):
    """The moment that a prompt ends.

    padding: what no row's slot holds.  per_layer: held, by layer and row.  asked, overhead: by row.  bits: nominal
    ones, by row, where numbers are coded.
    """

    padding: int
    per_layer: list[list[int]]
    asked: list[int]
    overhead: list[int]
    bits: list[float]
    itemsize: int

    def choose(self, rows: Sequence[int]) -> None:
        super().choose(rows)
        self.per_layer = [[of_layer[row] for row in rows] for of_layer in self.per_layer]
        self.asked, self.overhead = ([numbers[row] for row in rows] for numbers in (self.asked, self.overhead))
        self.bits = [self.bits[row] for row in rows] if self.bits else []


def own_bytes(tensors: Iterable[Tensor], tokens: Sequence[int], columns: int) -> list[int]:
    """What of the tensors' storages is each row's own: where one has a place per column, the row's tokens' alone.

    tokens: of every row.  columns: of the batch, padding included; [B, H, columns], [B, columns, M] and the like.
    """
    B, known = len(tokens), set[int]()
    own = [0] * B
    for x in tensors:
        size = nbytes([x], known)
        by_token = x.dim() > 1 and len(x) == B and columns in (x.shape[1:-1] if x.dim() > 3 else x.shape[1:])
        for row, n in enumerate(tokens):
            own[row] += size // B * n // columns if by_token else part(size, [row], B)
    return own


def part(total: int, rows: Sequence[int], of: int) -> int:
    """What some rows have of bytes that are shared out evenly among so many; the first ones have the remainder."""
    return sum(total // of + (row < total % of) for row in rows) if of else 0
