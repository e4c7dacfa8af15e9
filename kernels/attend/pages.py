"""Slots of heads that hold different numbers: flat storage, and a table that says where each head's slots lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """Flat storage of N places, every place a page of its own, and whose they are; R = B * H heads, b * H + h.

    k [N, D], v [N, Dv]; pos [N], int32, -1 where a slot has been freed.  at [M], int32: places of the first head's
    slots, then of the second's and so on.  first, held [R], int64: where in `at` a head's begin, and how many it has.
    most: the largest of `held`, as the host knows it.
    bias, factor: what the slots weigh, [N], float32, as in `weighed`; None: nothing.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    at: Tensor
    first: Tensor
    held: Tensor
    most: int
    bias: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def none(cls, k: Tensor, v: Tensor) -> Pages:
        """No slots, for heads of k [B, H, S, D] and v [B, H, S, Dv], which all lie elsewhere."""
        nowhere = k.new_empty(0, dtype=torch.int32)
        nothing = k.new_zeros(k.shape[0] * k.shape[1], dtype=torch.int64)
        return cls(k.new_empty(0, k.shape[-1]), v.new_empty(0, v.shape[-1]), nowhere, nowhere, nothing, nothing, 0)

    def places(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Places of every head's slots lo to hi, and whether there are so many, else some place; both [R, hi - lo]."""
        i = torch.arange(lo, hi, device=self.at.device)
        index = (self.first[:, None] + i).clamp_max(len(self.at) - 1)
        return self.at[index].long(), i < self.held[:, None]

    def blocks(self, elements: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which slots of every head, their places and whether they are there, so many elements of keys at a time."""
        size = max(1, elements // max(1, len(self.held) * self.k.shape[1]))
        for lo in range(0, self.most, size):
            hi = min(self.most, lo + size)
            yield slice(lo, hi), *self.places(lo, hi)
