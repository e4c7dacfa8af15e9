"""One state for all rows of a layer, or one for each once padding sets the rows apart."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reads
from methods.core.contract import LayerCache, Step
from methods.core.store import Store


class Rows(Protocol):
    """What is held of some rows of a layer, all at the same point of their sequences; its steps hold no padding."""

    store: Store

    def append(self, step: Step) -> None:
        """Bring in the step's keys and values."""

    def attend(self) -> Tensor:
        """The output [B, Hq, T, Dv] of the step that was appended."""

    def end_step(self, step: Step) -> None:
        """End of the turn: compress."""

    def copy(self, rows: slice) -> Self:
        """The same for some of the rows, sharing nothing."""


R = TypeVar("R", bound=Rows)


class PerRow(LayerCache, Generic[R]):
    """A layer of which each row may be at another point of its sequence.

    memories: one for all rows, or as many as there are rows.
    """

    def __init__(self, memory: R):
        self.memories = [memory]
        self.real: list[Tensor] = []  # per row, the columns of the step that are not padding

    @property
    def pos(self) -> Tensor:
        """Positions of the slots that are held, [B, H, S], -1 where a row holds fewer."""
        held = [memory.store.pos for memory in self.memories]
        longest = max(pos.shape[2] for pos in held)
        return torch.cat([F.pad(pos, (0, longest - pos.shape[2]), value=-1) for pos in held])

    def positions(self) -> Tensor:
        return self.pos

    def append(self, step: Step) -> None:
        if step.padded and len(self.memories) < step.q.shape[0]:
            self.memories = [self.memories[0].copy(slice(row, row + 1)) for row in range(step.q.shape[0])]
        self.real = []
        if len(self.memories) == 1 and not step.padded:
            self.memories[0].append(step)
            return
        if step.padded:
            self.real = [(pos >= 0).nonzero().flatten() for pos in step.pos]
        for row, memory in enumerate(self.memories):
            row_step = step.rows(slice(row, row + 1))
            if self.real:
                at = self.real[row]
                cut = {name: getattr(row_step, name).index_select(2, at) for name in ("q", "k", "v")}
                row_step = replace(row_step, **cut, pos=row_step.pos.index_select(1, at), padded=False)
            with reads.of_rows(slice(row, row + 1)):
                memory.append(row_step)

    def attend(self, step: Step) -> Tensor:
        parts = []
        for row, memory in enumerate(self.memories):
            with self._its_reads(row):
                parts.append(memory.attend())
        if not self.real:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        out = step.q.new_zeros(*step.q.shape[:3], step.v.shape[-1])
        for row, (part, at) in enumerate(zip(parts, self.real, strict=True)):
            out[row : row + 1, :, at] = part
        return out

    def end_step(self, step: Step) -> None:
        for row, memory in enumerate(self.memories):
            with self._its_reads(row):
                memory.end_step(step)

    def _its_reads(self, row: int) -> AbstractContextManager[None]:
        return reads.of_rows(slice(row, row + 1)) if len(self.memories) > 1 else nullcontext()

    def tensors(self) -> Iterable[Tensor]:
        for memory in self.memories:
            yield from memory.store.tensors()

    def expect(self, new: int) -> None:
        for memory in self.memories:
            memory.store.expect(new)

    def reorder(self, rows: Tensor) -> None:
        if len(self.memories) == 1:
            self.memories[0].store.reorder(rows)
        else:
            self.memories = [self.memories[row].copy(slice(None)) for row in rows.tolist()]
