"""A memory of fixed size for a sequence that is read in chunks: before a chunk, what is held is compressed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from kernels import attend_with_mass
from methods.core.budget import Budget
from methods.core.contract import Stage, Step
from methods.core.store import Store


class Chunks(Protocol):
    """What the memory asks of its method.

    lazy_end: the prompt's last chunk waits for the next token.  accumulate_scores: attention adds up over all chunks.
    """

    lazy_end: bool
    accumulate_scores: bool

    @property
    def request(self) -> Budget:
        """What its budget asks for."""

    @property
    def slots(self) -> int:
        """Slots that a compression leaves."""

    @property
    def max_slots(self) -> int:
        """A layer that holds more compresses before the next chunk."""

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""


@dataclass
class Slots:
    """Keys [B, H, S, D], values [B, H, S, Dv], positions and attention received [B, H, S] of some slots."""

    k: Tensor
    v: Tensor
    pos: Tensor
    mass: Tensor

    def gather(self, at: Tensor) -> Slots:
        """The slots at [B, H, n]."""
        k, v = (x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (self.k, self.v))
        return Slots(k, v, self.pos.gather(2, at), self.mass.gather(2, at))


class ChunkMemory:
    """Rows of one layer that are compressed at the same moments; `compressed` says how."""

    def __init__(self, method: Chunks, capacity: int | None):
        """capacity: places to make room for at the first append."""
        self.method = method
        self.store = Store(capacity)
        self.left = 0  # tokens that the current chunk still lacks; 0: the next one begins a chunk
        self.prompt = 0  # tokens of the prompt
        self.step: Step | None = None
        self.at = self.here = self.last = 0  # tokens of the step done, in this piece, and of them in the last chunk
        self.fresh = False  # whether the piece begins the last chunk

    def compressed(self, held: Slots) -> Slots:
        """`method.slots` slots in place of those that are held."""
        raise NotImplementedError

    def append(self, step: Step) -> None:
        """Bring in the first piece of the step; its rows hold no padding."""
        self.step, self.at = step, 0
        if step.q.shape[2] == 0:
            return
        if step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            self.prompt += step.q.shape[2]
        self._next_piece(step)

    def attend(self) -> Tensor:
        """The step's output [B, Hq, T, Dv]; later pieces are brought in when those before have attended."""
        assert self.step is not None, "a step is taken in before it attends"
        step, T = self.step, self.step.q.shape[2]
        if T == 0:
            return step.q.new_zeros(*step.q.shape[:3], step.v.shape[-1])
        out = [self._attend_piece(step)]
        while self.at < T:
            self._next_piece(step)
            out.append(self._attend_piece(step))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def end_step(self, step: Step) -> None:
        """Only within a prompt does a chunk stay open for the next step's tokens."""
        self.step = None
        if step.stage is Stage.MID_PROMPT:
            return
        self.left = 0
        if step.stage is Stage.ENDS_PROMPT:
            if not self.method.lazy_end and len(self.store) > self.method.max_slots:
                self._compress()
            self.store.tighten()

    def detach(self) -> None:
        """Let no later gradient reach what is held."""
        self.store.detach()

    def _next_piece(self, step: Step) -> None:
        """Compress if it is due, then append the rest of a chunk, and further chunks as long as nothing is due."""
        method, rest = self.method, step.q.shape[2] - self.at
        if self.left == 0:  # a chunk begins: the only moment at which the memory is compressed
            if len(self.store) > method.max_slots:
                self._compress()
            self.left, self.fresh = method.chunk, True
        # the rest of the chunk, as far as the step has tokens for it
        n = self.last = min(self.left, rest)
        self.left -= n
        # what follows would be compressed at its begin only if the memory were too full: until then it is one piece
        while n < rest and len(self.store) + n <= method.max_slots:
            self.last = min(method.chunk, rest - n)
            n, self.left, self.fresh = n + self.last, method.chunk - self.last, True
        self.here = n
        new = slice(self.at, self.at + n)
        self.store.append(step.k[:, :, new], step.v[:, :, new], step.pos[:, new])

    def _attend_piece(self, step: Step) -> Tensor:
        # the step itself where it is one piece, which is what most steps are
        piece, n = step, self.here
        if n < step.q.shape[2]:
            new = slice(self.at, self.at + n)
            piece = replace(step, q=step.q[:, :, new], k=step.k[:, :, new], v=step.v[:, :, new], pos=step.pos[:, new])
        self.at += n
        if not self._watched(step):
            return self.store.attend(piece)
        # slots are judged by the current chunk's queries, or by all of them where scores add up over chunks
        n = n if self.method.accumulate_scores else self.last
        k, v = self.store.read()
        out, each = attend_with_mass(
            piece.q, k, v, piece.rules, n, q_pos=piece.pos, k_pos=self.store.pos, layout="tail"
        )  # each [B, Hq, S]
        # a new chunk starts the sums anew; the query heads of a KV head add theirs
        received = self.store.track("mass")
        if self.fresh and not self.method.accumulate_scores:
            received.zero_()
        received += each.unflatten(1, (received.shape[1], -1)).sum(2)
        self.fresh = False
        return out

    def _watched(self, step: Step) -> bool:
        """Whether the next compression could look at the attention of this piece's queries."""
        if self.method.request.is_off:
            return False
        to_come = self.left if step.stage is Stage.MID_PROMPT else 0
        return self.method.accumulate_scores or len(self.store) + to_come > self.method.max_slots

    def _compress(self) -> None:
        """Fill the store anew, without free places."""
        store = self.store
        store.replace(**vars(self.compressed(Slots(store.k, store.v, store.pos, store.track("mass")))), exact=True)
        store.cap(self.method.max_slots + 1)

    def copy(self, rows: slice) -> Self:
        """The same for some of the rows."""
        twin = copy.copy(self)
        held = len(self.store.pos) if len(self.store) else 0
        twin.store = self.store.select(torch.arange(held)[rows])
        return twin
