"""What the passes behind a prompt read of the cache, and moved between host and device: by pass and by row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels import reads
from methods.core.contract import LayerCache, Stage, Step
from methods.core.metering.moments import nbytes, part

#: of passes that read what has been compressed
STAGES = (Stage.TURN, Stage.DECODE)


class PassReads:
    """Bytes of one pass: of every row the same, and what rows have beside that."""

    def __init__(self, of_layers: Sequence[reads.Bytes]):
        self.same = sum(one.same for one in of_layers)
        # more of rows, as the host knows it, and as a device does; nothing is sent from one to the other
        listed = [one.listed for one in of_layers if one.listed]
        self.listed = [sum(of_row) for of_row in zip(*listed, strict=True)]
        apart: dict[int, list[Tensor]] = {}
        for one in of_layers:
            for size, counts in one.apart.items():
                apart.setdefault(size, []).extend(counts)
        sums = [torch.stack([x.to(counts[0].device) for x in counts]).sum(0) * size for size, counts in apart.items()]
        self.apart = sum((x.to(sums[0].device) for x in sums[1:]), start=sums[0]) if sums else None  # [B]


class Reading:
    """Counts what the layers of one cache read, pass by pass; no pass waits for a device."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []  # of the passes since the prompt
        self.by_token: list[bool] = []  # whether each token of such a pass has read for itself, as while decoding
        self.read: list[PassReads] = []
        self.moved: list[PassReads] = []
        self._step: Step | None = None  # of the turn that goes on
        self._turn = reads.Turn(0)
        self._turns: list[reads.Turn] = []  # of this pass's layers
        self._known: tuple[list[list[int]], list[list[int]]] | None = None  # what `by_row` gives

    def during(self, step: Step) -> AbstractContextManager[None]:
        """Count what ops are handed inside the block, as part of the layer's turn."""
        if step.stage not in STAGES:
            return nullcontext()
        if self._step is not step:
            self._step, self._turn = step, reads.Turn(len(step.pos))
        return self._turn

    def end_turn(self, step: Step, layer: LayerCache) -> None:
        """A layer's turn is over. One that handed nothing to an op has read all that it holds, as far as is known."""
        if step.stage not in STAGES:
            return
        turn = self._turn if self._step is step else reads.Turn(len(step.pos))
        if not turn.read:
            turn.read.listed = layer.held_bytes() or _evenly(layer, len(step.pos))
        turn.again()  # lets go of tensors
        if step.layer == 0:
            self._turns = []
        self._turns.append(turn)
        self._step = None
        if step.layer == step.n_layers - 1:
            self._known = None
            self.stages.append(step.stage)
            self.by_token.append(any(one.by_token for one in self._turns))
            self.read.append(PassReads([one.read for one in self._turns]))
            self.moved.append(PassReads([one.moved for one in self._turns]))
            self._turns = []

    def clear(self) -> None:
        """A prompt has ended: what was read before is of another one."""
        self.stages, self.by_token, self.read, self.moved, self._known = [], [], [], [], None

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]."""
        passes, self._known = [*self.read, *self.moved], None
        differ = any(len(set(one.listed)) > 1 for one in passes)
        order = rows.tolist() if differ else [0] * len(rows)
        for one in passes:
            one.listed = [one.listed[row] for row in order] if one.listed else []
        apart = [(one, one.apart) for one in passes if one.apart is not None]
        if apart:
            whole = torch.stack([x.to(apart[0][1].device) for _, x in apart])
            for (one, _), new in zip(apart, whole.index_select(1, rows.to(whole.device)), strict=True):
                one.apart = new

    def counted(self, behind: int) -> list[int]:
        """The passes whose mean a row's reads are: those of a token each, or else all; of the last `behind` none."""
        n = len(self.stages) - behind
        return [i for i in range(n) if self.stages[i] is Stage.DECODE] or list(range(n))

    def by_row(self, rows: int) -> tuple[list[list[int]], list[list[int]]]:
        """Bytes read and moved, each by pass and row; waits for the device."""
        if self._known is None:
            self._known = _by_row(self.read, rows), _by_row(self.moved, rows)
        return self._known

    def turns(self, behind: int) -> list[int]:
        """The passes of a row's turns."""
        return [i for i in range(len(self.stages) - behind) if self.stages[i] is Stage.TURN]


def _by_row(passes: Sequence[PassReads], rows: int) -> list[list[int]]:
    apart = [one.apart for one in passes if one.apart is not None]
    known = iter(torch.stack([x.to(apart[0].device) for x in apart]).tolist() if apart else ())
    nothing = [0] * rows
    return [
        [one.same + a + b for a, b in zip(one.listed or nothing, nothing if one.apart is None else next(known))]
        for one in passes
    ]


def _evenly(layer: LayerCache, rows: int) -> list[int]:
    size = nbytes(layer.tensors())
    return [part(size, [row], rows) for row in range(rows)]
