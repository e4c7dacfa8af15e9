"""Queries in whole blocks of a row's own tokens, and their attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import attention_probs
from kernels.select import compact
from methods.core.contract import Step
from methods.core.decision import joined
from methods.core.store import Store


class Blocks:
    """Queries in blocks of `size` tokens, counted by each row's own, whatever pieces they come in.

    What is short of a block is held until the rest comes.
    """

    def __init__(self, size: int):
        self.size = size
        self.held: tuple[Tensor, Tensor] | None = None  # q [B, Hq, t, D], pos [B, t]

    def take(self, step: Step, ends: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks that are whole now: q [B, Hq, size, D], pos [B, size], -1 in rows that have none.

        ends: nothing more will come, so that what is left is a block, maybe a short one.
        """
        old = [] if self.held is None else [self.held]
        q, pos = joined([*old, (step.q, step.pos)])
        real = pos >= 0
        n = real.sum(1)  # [B]
        slots, there = compact(real, int(n.max()))
        q, pos = _taken(q, slots), torch.where(there, pos.gather(1, slots), -1)
        whole = (n if ends else n // self.size * self.size)[:, None]
        here = torch.arange(pos.shape[1], device=pos.device)
        now = torch.where(here < whole, pos, -1)
        for i in range(0, int(whole.max()), self.size):
            yield q[:, :, i : i + self.size], now[:, i : i + self.size]
        left = here >= whole
        slots, there = compact(left & (pos >= 0), int((n - whole[:, 0]).max()))
        rest = _taken(q, slots), torch.where(there, pos.gather(1, slots), -1)
        self.held = None if ends or not slots.shape[1] else rest

    def attention(
        self, store: Store, step: Step, ends: bool, known: dict[Any, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention [B, H, G, size, S] of the blocks that are whole now to the store's slots, and their positions.

        known: what others that hold the same have computed of this step; what is new is put there.
        """
        for i, (q, pos) in enumerate(self.take(step, ends)):
            key = "block", self.size, i, len(store)
            if key not in known:
                at = {"q_pos": pos, "k_pos": store.pos, "bias": store.weights().get("bias")}
                known[key] = attention_probs(q, store.read()[0], step.rules, **at)
            yield known[key], pos

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]."""
        if self.held is not None:
            self.held = self.held[0][rows], self.held[1][rows]

    def tensors(self) -> Iterable[Tensor]:
        """What is held until its block is whole."""
        return () if self.held is None else self.held


def _taken(q: Tensor, slots: Tensor) -> Tensor:
    """The queries slots [B, n] of q [B, Hq, T, D], in memory of their own."""
    return q.gather(2, slots[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
