"""Heavy-hitter eviction written out: every attention row in full and in float64, one head at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import Rules
from tests.bounds import SHARP, bound, near
from tests.kernels.formula import NOISIEST

#: attention of query i over these positions, summed over the query heads that share the KV head: row(h, i, held)
Row = Callable[[int, int, list[int]], Tensor]


class Recorded:
    """Queries and keys of one layer and batch row, as the model made them, by position."""

    def __init__(self, cache: Any, layer: int, row: int = 0):
        self.inner, self.row = cache.layers[layer].inner, row
        self.q: list[Tensor] = []  # [Hq, D]
        self.k: list[Tensor] = []  # [H, D]
        self.rules = Rules(1.0)
        append = self.inner.append

        def taken(step):
            append(step)
            real = step.pos[row] >= 0
            self.rules = step.rules
            self.q += step.q[row][:, real].double().unbind(1)
            self.k += step.k[row][:, real].double().unbind(1)

        self.inner.append = taken

    def logits(self, h: int, i: int, held: list[int]) -> Tensor:
        """Scores of query i and its heads of KV head h over `held`, [G, n], the model's scale and slopes included."""
        k = torch.stack([self.k[j][h] for j in held])  # [n, D]
        G = len(self.q[0]) // len(self.k[0])
        x = self.q[i][h * G : (h + 1) * G] @ k.T * self.rules.scale
        if self.rules.slopes is not None:
            back = i - torch.tensor(held, dtype=torch.float64)
            x = x - self.rules.slopes[h * G : (h + 1) * G, None].double() * back
        return x

    def softmax(self, h: int, i: int, held: list[int]) -> Tensor:
        return self.logits(h, i, held).softmax(-1).sum(0)


class HeavyHitters:
    """One KV head: sums of its rows, and what stays of `size` slots of which `recent` are the newest."""

    def __init__(self, row: Row, h: int, size: int, recent: int):
        self.row, self.h, self.size, self.recent = row, h, size, recent
        self.sums: dict[int, float] = {}

    def prompt(self, n: int) -> None:
        self.sums = dict.fromkeys(range(n), 0.0)
        for i in range(n):
            self._add(i, list(range(i + 1)))
        self._cut()

    def step(self, i: int) -> None:
        self.sums[i] = 0.0
        self._add(i, sorted(self.sums))
        self._cut()

    def _add(self, i: int, held: list[int]) -> None:
        for j, p in zip(held, self.row(self.h, i, held).tolist(), strict=True):
            self.sums[j] += p

    def _cut(self) -> None:
        held = sorted(self.sums)
        if len(held) <= self.size:
            return
        newest = held[len(held) - self.recent :]
        others = sorted(held[: len(held) - self.recent], key=lambda j: (-self.sums[j], j))
        self.sums = {j: self.sums[j] for j in sorted([*others[: self.size - self.recent], *newest])}


def check(layer: Any, name: str, hand: list[HeavyHitters], row: int = 0) -> None:
    """The layer holds the same tokens with the same sums in its side array `name`."""
    store, off = layer.inner.store, bound(torch.float32, 128, SHARP + NOISIEST, width=16)
    for h, one in enumerate(hand):
        pos, sums = store.pos[row, h].tolist(), store.track(name)[row, h].tolist()
        held = {p: s for p, s in zip(pos, sums, strict=True) if p >= 0}
        assert sorted(held) == sorted(one.sums)
        for p, s in held.items():
            near(s, one.sums[p], off * one.sums[p])  # every weight is off by a part of itself
