"""Stores that pack: rows lie apart wherever they hold different numbers of slots, so that padding enters no code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels import reads
from kernels.select import compact
from methods.core.contract import Holding, Step
from methods.core.decision import taken
from methods.core.store import WEIGHTS, Store


class Part:
    """Rows of the batch that hold the same number of slots, none of them padding. Bytes are of all its rows."""

    @property
    def rows(self) -> int:
        """How many rows of the batch it has."""
        raise NotImplementedError

    @property
    def n(self) -> int:
        """Slots of every head."""
        raise NotImplementedError

    @property
    def positions(self) -> Tensor:
        """Positions of the slots, [b, H, n], int32."""
        raise NotImplementedError

    @property
    def used(self) -> int:
        """Bytes of places in use."""
        raise NotImplementedError

    @property
    def free(self) -> int:
        """Bytes of places not in use."""
        raise NotImplementedError

    @property
    def beside(self) -> int:
        """Bytes in use that are documented on top of the budget: positions."""
        raise NotImplementedError

    def used_of(self, visible: int | None) -> int:
        """`used`, but of the newest so many slots alone, which later queries can see, as far as the rest can go."""
        return self.used

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys [b, H, n, D] and values [b, H, n, Dv]."""
        raise NotImplementedError

    def append(self, k: Tensor, v: Tensor, pos: Tensor, to_come: int | None = None) -> None:
        """k [b, H, T, D], v [b, H, T, Dv], pos [b, 1, T]; to_come: tokens that will still come, these included."""
        raise NotImplementedError

    def attend(self, step: Step) -> Tensor:
        """Output [b, Hq, T, Dv] of the queries of these rows, their own tokens included."""
        raise NotImplementedError

    def pack(self, to_come: int | None = None) -> None:
        """Pack what is due; to_come: as in `append`."""
        raise NotImplementedError

    def keep_newest(self, n: int) -> None:
        """Let go of what is older than the n newest slots, as far as it can be freed."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> Self:
        """These rows, in memory of their own."""
        raise NotImplementedError

    def tensors(self) -> Iterable[Tensor]:
        """All buffers, free places included."""
        raise NotImplementedError


class PartedStore(Store):
    """A Store that packs its slots once the prompt is whole; subclasses say into what.

    Until something is packed it is a plain Store, bit for bit. Then the rows of the batch lie in parts whose rows hold
    the same number of slots: one part for a batch without padding, else one per row, so that what a row packs is what
    it would alone, counted by its own tokens.
    """

    heads_alike: ClassVar[bool] = True
    #: every row is a part of its own: what rows pack is not of the same size
    rows_apart: ClassVar[bool] = False

    def __init__(self, capacity: int | None = None):
        super().__init__(capacity)
        self.parts: list[Any] = []  # of class Part
        self.counts: list[int] | None = None  # slots of every row while nothing is packed; None: to be counted

    def part(self, row: int, k: Tensor, v: Tensor, pos: Tensor) -> Part:
        """What holds some rows, row … on, from now on: k [b, H, n, D], v [b, H, n, Dv], pos [b, H or 1, n]."""
        raise NotImplementedError

    def packs(self, counts: Sequence[int]) -> bool:
        """Whether any row, of so many slots each, has something to pack."""
        raise NotImplementedError

    def __len__(self) -> int:
        return max((part.n for part in self.parts), default=self.n)

    @property
    def pos(self) -> Tensor:
        return _stack([part.positions for part in self.parts], -1) if self.parts else super().pos

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as later steps see them: copies once something is packed; `pos` tells padding."""
        if not self.parts:
            return super().read()
        k, v = zip(*(part.read() for part in self.parts), strict=True)
        return _stack(k, 0), _stack(v, 0)

    def append(self, k: Tensor, v: Tensor, pos: Tensor, padded: bool = False) -> None:
        if not self.parts:
            super().append(k, v, pos, padded)
            if self.counts is not None:  # counted here, so that no device is waited for while decoding
                self.counts = None if padded else [n + pos.shape[1] for n in self.counts]
            return
        counts, to_come = [pos.shape[1]] * len(pos), self.to_come or None
        if padded:  # a later turn's: its rows go on with different numbers of tokens
            self._split()
            counts = (pos >= 0).sum(-1).tolist()
        for part, rows in self.by_part():
            part.append(*_real(k[rows], v[rows], pos[rows, None], counts[rows.start]), to_come)
        if to_come is not None and pos.shape[1] == 1:
            self.to_come = to_come - 1  # 0 while the last one is packed: it needs no places behind it

    def attend(self, step: Step) -> Tensor:
        if not self.parts:
            return super().attend(step)
        if len(self.parts) == 1:
            return self.parts[0].attend(step)
        return torch.cat([part.attend(step.rows(rows)) for part, rows in self.by_part()])

    def pack(self, step: Step) -> None:
        if not self.parts:
            self._start_packing()
        for part in self.parts:
            part.pack(self.to_come)

    def keep(self, mask: Tensor, n: int, exact: bool = False) -> None:
        self._refuse_if_packed("drop single slots")
        super().keep(mask, n, exact)
        self.counts = None

    def replace(self, k: Tensor, v: Tensor, pos: Tensor, exact: bool = False, **side: Tensor) -> None:
        self._refuse_if_packed("replace slots")
        super().replace(k, v, pos, exact, **side)
        self.counts = None

    def rekey(self, k: Tensor) -> None:
        self._refuse_if_packed("turn keys")
        super().rekey(k)

    def drop(self, slot: Tensor, rows: Sequence[bool] | None = None) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: cannot free a single slot for the next token; pair it with a method that drops "
            "only when the prompt ends, such as snapkv"
        )

    def track(
        self, name: str, fill: float = 0.0, width: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        self._refuse_if_packed("follow single slots")
        if name in WEIGHTS:
            raise NotImplementedError(f"{type(self).__name__}: packed slots weigh alike; {name} needs a plain store")
        return super().track(name, fill, width, dtype)

    def forget(self, name: str) -> None:
        if not self.parts:  # packing has let go of all of them
            super().forget(name)

    def keep_newest(self, n: int, slack: int = 0) -> None:
        if not self.parts and self.n > n + slack:
            super().keep_newest(n)
            self.counts = None
        for part in self.parts:
            if part.n > n + slack:
                part.keep_newest(n)

    def tensors(self) -> Iterable[Tensor]:
        yield from super().tensors()
        for part in self.parts:
            yield from part.tensors()

    def holding(self, visible: int | None = None) -> Holding:
        """As the base's; once something is packed, codes, scales and residual, and on top of the budget positions."""
        if not self.parts:
            return super().holding(visible)
        whole = Holding([], [], [])
        for part in self.parts:
            n, used = part.rows, part.used_of(visible)
            numbers = (used, part.beside * used // part.used, part.used + part.free - used)
            for of_rows, size in zip((whole.held, whole.beside, whole.padding), numbers):
                of_rows += [size // n] * n
        return whole

    def held_bytes(self, visible: int | None = None) -> list[int]:
        if not self.parts:
            return super().held_bytes(visible)
        return [part.used_of(visible) // part.rows for part in self.parts for _ in range(part.rows)]

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """Bytes that the budget allows of so many in full precision; all of them unless overridden."""
        return list(full)

    def nominal_bits(self) -> Sequence[float] | None:
        """Of each row, bits of a number's code; None before anything is packed."""
        return None

    def traits(self, row: int) -> Mapping[str, Any]:
        """What a row's record says of how it is packed, once the prompt is whole."""
        return {}

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.counts = None if self.counts is None else taken(self.counts, rows)
        if len(self.parts) == 1 and not self.rows_apart:
            self.parts = [self.parts[0].select(rows)]
        elif self.parts:
            first = rows.new_zeros(1)
            self.parts = [self.parts[row].select(first) for row in rows.tolist()]

    def by_part(self) -> Iterator[tuple[Any, slice]]:
        """Parts and the rows of the batch that they hold, whose reads are theirs."""
        row = 0
        for part in self.parts:
            rows = slice(row, row + part.rows)
            with reads.of_rows(rows):
                yield part, rows
            row += part.rows

    def _start_packing(self) -> None:
        """Turn the plain slots into parts, if any row has something to pack."""
        if not self.buffers:
            return
        k, v, pos = self.k, self.v, self.buffers["pos"][:, :, : self.n]
        if self.counts is None:
            self.counts = self._count(pos)
        if not self.packs(self.counts):
            return
        whole = self.whole or [pos.shape[1] == 1] * len(pos)
        apart = self.rows_apart or self.padded or len(set(whole)) > 1
        for rows in [slice(row, row + 1) for row in range(len(pos))] if apart else [slice(0, len(pos))]:
            at = pos[rows, :1] if whole[rows.start] else pos[rows]
            self.parts.append(self.part(rows.start, *_real(k[rows], v[rows], at, self.counts[rows.start])))
        self.buffers, self.fills, self.n, self.padded, self.real = {}, {}, 0, False, None

    def _count(self, pos: Tensor) -> list[int]:
        """Slots of every row that are not padding, from pos [B, H or 1, S]."""
        if not self.padded:
            return [self.n] * len(pos)
        per_head = (pos >= 0).sum(-1)
        if not bool((per_head == per_head[:, :1]).all()):
            raise NotImplementedError(
                f"{type(self).__name__}: the heads of a row hold different numbers of slots; it packs rows whose heads "
                "hold alike, as the uniform allocator leaves them"
            )
        return per_head[:, 0].tolist()

    def _split(self) -> None:
        """One part per row: a turn's padding lets rows come apart."""
        self.parts = [
            part.select(torch.tensor([row], device=part.positions.device)) if part.rows > 1 else part
            for part in self.parts
            for row in range(part.rows)
        ]

    def _slots(self) -> list[int]:
        """Slots that every head of a row holds."""
        if not self.parts:
            return [n // self.k.shape[1] for n in self.counted()]
        return [part.n for part in self.parts for _ in range(part.rows)]

    def _span(self) -> str:
        """Why a packed slot is no slot by itself, after a comma; or nothing."""
        return ""

    def _refuse_if_packed(self, what: str) -> None:
        if self.parts:
            raise NotImplementedError(
                f"{type(self).__name__}: cannot {what} once they are packed{self._span()}; pair it with a method that "
                "drops only when the prompt ends, such as snapkv"
            )


def _real(k: Tensor, v: Tensor, pos: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n slots that are not padding, alike in all rows and heads: k and v [b, H, n, D], pos [b, H or 1, n]."""
    if pos.shape[-1] == n:
        return k, v, pos
    slots, _ = compact(pos >= 0, n)  # [b, H or 1, n]
    of_head = slots.expand(-1, k.shape[1], -1)[..., None]
    k, v = (x.gather(2, of_head.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v, pos.gather(-1, slots)


def _stack(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Rows [b, H, n, ...] of parts with different n as one tensor, filled up at the end."""
    if len(parts) == 1:
        return parts[0]
    longest = max(x.shape[2] for x in parts)
    whole = parts[0].new_full((sum(len(x) for x in parts), parts[0].shape[1], longest, *parts[0].shape[3:]), fill)
    row = 0
    for x in parts:
        whole[row : row + len(x), :, : x.shape[2]] = x
        row += len(x)
    return whole
