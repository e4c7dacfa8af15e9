"""Slots as low-bit codes, except the newest: what stores of quantized keys and values share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kernels.select import compact
from methods.core.budget import share
from methods.core.contract import Holding, Step
from methods.core.decision import taken
from methods.core.store import WEIGHTS, Store
from methods.core.stores.packed import GrowableBuffer, PackedTensor, RowGroup
from methods.core.stores.scheme import Scheme


class QuantizedStore(Store):
    """A Store that packs its slots once the prompt is whole, and later tokens as they leave the residual.

    Until something is packed it is a plain Store, bit for bit. Then the rows of the batch lie in parts whose rows hold
    the same number of slots: one part for a batch without padding, else one per row, so that a row's groups and
    residual are those it would have alone. Packed slots stay as they are: single ones cannot be dropped.
    """

    heads_alike: ClassVar[bool] = True

    def __init__(
        self, schemes: Sequence[tuple[Scheme, Scheme]], budget: float | None = None, capacity: int | None = None
    ):
        """schemes: of keys and values, best first.  budget: of all that fit so large a share of the row's bytes in full
        precision (above 1: so many slots) the first is taken, else the smallest; None: always the first."""
        super().__init__(capacity)
        self.schemes, self.budget = schemes, budget
        self.layers: Sequence[Sequence[tuple[Scheme, Scheme]]] = [schemes]  # whose bytes the budget is for
        self.parts: list[RowGroup] = []
        self.counts: list[int] | None = None  # slots of every row while nothing is packed; None: to be counted
        self.chosen: list[tuple[Scheme, Scheme]] = []  # for every row, once the prompt is whole

    def __len__(self) -> int:
        return max((part.pos.n for part in self.parts), default=self.n)

    @property
    def pos(self) -> Tensor:
        if not self.parts:
            return super().pos
        H = self.parts[0].keys.recent.shape[1]
        return _stack([part.pos.used.expand(-1, H, -1) for part in self.parts], -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as later steps see them: copies once something is packed; `pos` tells padding."""
        if not self.parts:
            return super().read()
        return _stack([part.keys.read() for part in self.parts], 0), _stack([p.values.read() for p in self.parts], 0)

    def check(self, D: int) -> None:
        """Raises UserError when heads of this width cannot be packed."""
        for pair in self.schemes:
            for scheme in pair:
                if scheme.bits != 16:
                    scheme.width(D)

    def choose_with(self, layers: Sequence[Sequence[tuple[Scheme, Scheme]]], layer: int, budget: float | None) -> None:
        """Let all layers choose the same place of their lists, whose bytes together fit the budget.

        layers: the lists of all layers, best first and equally long.  layer: which of them is this store's.
        """
        self.layers, self.schemes, self.budget = layers, layers[layer], budget

    def choose(self, n: int, D: int, Dv: int, itemsize: int) -> tuple[Scheme, Scheme]:
        """Schemes of keys and values for a row with n slots of these widths and this many bytes per number."""
        if self.budget is None:
            return self.schemes[0]
        sizes = [
            sum(k.nbytes(n, D, itemsize) + v.nbytes(n, Dv, itemsize) for k, v in of_layers)
            for of_layers in zip(*self.layers, strict=True)
        ]
        allowed = share(self.budget, n) * n * (D + Dv) * itemsize * len(self.layers)
        best = next((i for i, size in enumerate(sizes) if size <= allowed), sizes.index(min(sizes)))
        return self.schemes[best]

    def append(self, k: Tensor, v: Tensor, pos: Tensor, padded: bool = False) -> None:
        if not self.parts:
            super().append(k, v, pos, padded)
            if self.counts is not None:  # counted here, so that no device is waited for while decoding
                self.counts = None if padded else [n + pos.shape[1] for n in self.counts]
            return
        counts = [pos.shape[1]] * len(pos)
        if padded:  # a later turn's: its rows go on with different numbers of tokens
            self._split()
            counts = (pos >= 0).sum(-1).tolist()
        row = 0
        for part in self.parts:
            rows = slice(row, row + part.rows)
            row += part.rows
            part.append(*_real(k[rows], v[rows], pos[rows, None], counts[rows.start]), self.to_come)
        if self.to_come is not None and pos.shape[1] == 1:
            self.to_come = self.to_come - 1 if self.to_come > 1 else None

    def attend(self, step: Step) -> Tensor:
        if not self.parts:
            return super().attend(step)
        if len(self.parts) == 1:
            return self.parts[0].attend(step)
        out, row = [], 0
        for part in self.parts:
            out.append(part.attend(step.rows(slice(row, row + part.rows))))
            row += part.rows
        return torch.cat(out)

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
            raise NotImplementedError(
                f"{type(self).__name__}: packed slots weigh alike; {name} needs a store of plain slots"
            )
        return super().track(name, fill, width, dtype)

    def forget(self, name: str) -> None:
        if not self.parts:  # packing has let go of all of them
            super().forget(name)

    def keep_newest(self, n: int, slack: int = 0) -> None:
        if not self.parts and self.n > n + slack:
            super().keep_newest(n)
            self.counts = None
        for part in self.parts:
            if part.pos.n > n + slack:
                part.keep_newest(n)

    def tensors(self) -> Iterable[Tensor]:
        yield from super().tensors()
        for part in self.parts:
            yield from part.keys.tensors()
            yield from part.values.tensors()
            yield part.pos.buffer

    def holding(self, visible: int | None = None) -> Holding:
        """As the base's; once something is packed, codes, scales and residual, and on top of the budget positions."""
        if not self.parts:
            return super().holding(visible)
        whole = Holding([], [], [])
        for part in self.parts:
            n, used = part.rows, part.used_of(visible)
            numbers = (used, part.pos.nbytes * used // part.used, part.used + part.free - used)
            for of_rows, size in zip((whole.held, whole.beside, whole.padding), numbers):
                of_rows += [size // n] * n
        return whole

    def held_bytes(self, visible: int | None = None) -> list[int]:
        if not self.parts:
            return super().held_bytes(visible)
        return [part.used_of(visible) // part.rows for part in self.parts for _ in range(part.rows)]

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """Bytes that the budget allows of so many in full precision; without one, what the only scheme comes to."""
        if self.budget is not None:
            return [int(share(self.budget, n) * size) for n, size in zip(self._slots(), full, strict=True)]
        return [part.nbytes() // part.rows for part in self.parts for _ in range(part.rows)] or list(full)

    def nominal_bits(self) -> Sequence[float] | None:
        """Bits of a code, of keys and values; None before the prompt has ended."""
        return [sum(scheme.bits for scheme in pair) / len(pair) for pair in self.chosen] or None

    def traits(self, row: int) -> dict[str, int]:
        """Bits of a row's keys and values, once the prompt is whole."""
        return dict(zip(("key bits", "value bits"), (scheme.bits for scheme in self.chosen[row])))

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.chosen = taken(self.chosen, rows)
        self.counts = None if self.counts is None else taken(self.counts, rows)
        if len(self.parts) == 1:
            self.parts = [self.parts[0].select(rows)]
        elif self.parts:
            first = rows.new_zeros(1)
            self.parts = [self.parts[row].select(first) for row in rows.tolist()]

    def _start_packing(self) -> None:
        """Turn the plain slots into parts, if any row has something to pack."""
        k, v, pos = self.k, self.v, self.buffers["pos"][:, :, : self.n]
        if self.counts is None:
            self.counts = self._count(pos)
        if not self.chosen:
            sizes = k.shape[-1], v.shape[-1], k.element_size()
            self.chosen = [self.choose(n, *sizes) for n in self.counts]
        if not any(scheme.due(n) for n, pair in zip(self.counts, self.chosen) for scheme in pair):
            return
        whole = self.whole or [pos.shape[1] == 1] * len(pos)
        apart = self.padded or len(set(whole)) > 1
        for rows in [slice(row, row + 1) for row in range(len(pos))] if apart else [slice(0, len(pos))]:
            n = self.counts[rows.start]
            at = pos[rows, :1] if whole[rows.start] else pos[rows]
            arrays = _real(k[rows], v[rows], at, n)
            # a side that packs takes what it leaves over into memory of its own
            keys, values = (
                PackedTensor(x if s.due(n) else x.clone(), s) for x, s in zip(arrays, self.chosen[rows.start])
            )
            self.parts.append(RowGroup(keys, values, GrowableBuffer(arrays[2].clone())))
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
            part.select(torch.tensor([row], device=part.pos.buffer.device)) if part.rows > 1 else part
            for part in self.parts
            for row in range(part.rows)
        ]

    def _slots(self) -> list[int]:
        """Slots that every head of a row holds."""
        if not self.parts:
            return [n // self.k.shape[1] for n in self.counted()]
        return [part.pos.n for part in self.parts for _ in range(part.rows)]

    def _refuse_if_packed(self, what: str) -> None:
        if self.parts:
            raise NotImplementedError(
                f"{type(self).__name__}: cannot {what} once they are packed, a scale spans {self.schemes[0][0].group} "
                "elements; pair it with a method that drops only when the prompt ends, such as snapkv"
            )


def _real(k: Tensor, v: Tensor, pos: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n slots that are not padding, alike in all rows and heads: k and v [b, H, n, D], pos [b, H or 1, n]."""
    if pos.shape[-1] == n:
        return k, v, pos
    slots, _ = compact(pos >= 0, n)  # [b, H or 1, n]
    of_head = slots.expand(-1, k.shape[1], -1)[..., None]
    k, v = (x.gather(2, of_head.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v, pos.gather(-1, slots)


def _stack(parts: list[Tensor], fill: float) -> Tensor:
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
