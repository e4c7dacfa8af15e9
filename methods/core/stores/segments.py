"""A store of segments: slots with positions, widths and attention of their own, merged in one softmax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels import attend, merged_all
from methods.core.contract import Step
from methods.core.stores.parts import Part, PartedStore
from methods.core.stores.segment import CodedSegment, PlainSegment, Segment


class SegmentedRows(Part):
    """Rows that hold the same number of slots: segments, and the newest tokens as they came."""

    def __init__(self, recent: PlainSegment, before: int = 0):
        """before: tokens of every row that were let go of by age."""
        self.segments: list[Segment] = []
        self.recent = recent
        self.count = before + recent.n  # tokens of every row so far

    @property
    def all(self) -> list[Segment]:
        """Segments, and the newest tokens where there are any."""
        return [*self.segments, self.recent] if self.recent.n or not self.segments else self.segments

    @property
    def before(self) -> int:
        """Tokens of every row that come before the newest, packed or gone."""
        return self.count - self.recent.n

    @property
    def rows(self) -> int:
        return self.recent.pos.shape[0]

    @property
    def n(self) -> int:
        return sum(one.n for one in self.segments) + self.recent.n

    @property
    def positions(self) -> Tensor:
        H = self.recent.read()[0].shape[1]
        return torch.cat([one.pos.expand(-1, H, -1) for one in self.all], 2)

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = zip(*(one.read() for one in self.all), strict=True)
        return torch.cat(k, 2), torch.cat(v, 2)

    def append(self, k: Tensor, v: Tensor, pos: Tensor, to_come: int | None = None) -> None:
        self.recent.append(k, v, pos, to_come)
        self.count += k.shape[2]

    def attend(self, step: Step) -> Tensor:
        if not self.segments:
            return attend(step.q, *self.recent.read(), step.rules, q_pos=step.pos, k_pos=self.recent.pos)
        return merged_all([one.attend(step) for one in self.all])[0]

    def take(self, segments: Sequence[Segment], n: int, to_come: int | None = None) -> None:
        """The n oldest of the newest tokens are these segments now; to_come: tokens that will still come."""
        self.recent.drop(n)
        for new in segments:
            new.until = self.before
            for old in reversed(self.segments):
                if old.join(new, to_come):
                    old.until = new.until
                    break
            else:
                self.segments.append(new)

    def pack(self, to_come: int | None = None) -> None:
        """Nothing: the store knows what is due."""

    def keep_newest(self, n: int) -> None:
        """Segments go as a whole."""
        self.segments = [one for one in self.segments if one.until > self.count - n]
        if self.recent.n > n:
            self.recent.drop(self.recent.n - n)

    def keep(self, mask: Tensor) -> None:
        """Drop all slots but those in mask [b, H, n]. Raises NotImplementedError, before any goes, where one cannot."""
        parts = mask.split([one.n for one in self.all], 2)
        losing = [(one, part) for one, part in zip(self.all, parts) if not bool((part | (one.pos < 0)).all())]
        for one, _ in losing:
            one.check_drops()
        for one, part in losing:
            one.keep(part)
        self.segments = [one for one in self.segments if one.n]

    def select(self, rows: Tensor) -> SegmentedRows:
        twin = SegmentedRows(self.recent.select(rows))
        twin.segments, twin.count = [one.select(rows) for one in self.segments], self.count
        return twin

    def tensors(self) -> Iterable[Tensor]:
        for one in (*self.segments, self.recent):
            yield from one.tensors()

    @property
    def used(self) -> int:
        return self.beside + sum(one.used for one in (*self.segments, self.recent))

    @property
    def free(self) -> int:
        return sum(one.free for one in (*self.segments, self.recent))

    @property
    def beside(self) -> int:
        return sum(one.at.nbytes for one in (*self.segments, self.recent))


class SegmentedStore(PartedStore):
    """A store whose older slots lie in segments; a subclass says which tokens are due, and what becomes of them.

    Both are asked of rows that hold the same number of slots, none of them padding: sinks and blocks count a row's own
    tokens, whatever the batch and the pieces that a prompt comes in.
    """

    def due(self, n: int, before: int) -> int:
        """How many of a row's n newest tokens are to be packed now.

        before: tokens of the row that come before those: packed, or in a sliding layer gone.
        """
        raise NotImplementedError

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: Step) -> list[Segment]:
        """What the tokens that are due become: k [b, H, n, D], v [b, H, n, Dv], pos [b, H or 1, n], oldest first.

        rows: of the batch.  before: as in `due`.  step: of the whole batch.
        """
        raise NotImplementedError

    def packs(self, counts: Sequence[int]) -> bool:
        return any(self.due(n, 0) for n in counts)

    def part(self, row: int, k: Tensor, v: Tensor, pos: Tensor) -> SegmentedRows:
        gone = int(pos[0, 0, 0]) if pos.shape[1] == 1 else 0  # where heads hold their own, slots went by score
        return SegmentedRows(PlainSegment(k, v, pos), gone)

    def pack(self, step: Step) -> None:
        super().pack(step)
        for part, rows in self.by_part():
            n = self.due(part.recent.n, part.before)
            if n:
                k, v = (x[:, :, :n] for x in part.recent.read())
                segments = self.segments(rows, k, v, part.recent.pos[..., :n], part.before, step)
                part.take(segments, n, self.to_come)

    def keep(self, mask: Tensor, n: int, exact: bool = False) -> None:
        """As the base's; once something is packed, refused by name where a segment cannot drop a slot."""
        if not self.parts:
            super().keep(mask, n, exact)
            return
        for part, rows in self.by_part():
            part.keep(mask[rows, :, : part.n])

    def nominal_bits(self) -> Sequence[float] | None:
        if not self.parts:
            return None
        of_rows = []
        for part in self.parts:
            codes = [one.bits for one in part.segments if isinstance(one, CodedSegment)]
            bits, numbers = (sum(x) for x in zip(*codes, strict=True)) if codes else (16.0, 1)
            of_rows += [bits / numbers] * part.rows
        return of_rows
