"""One prompt pass for many caches, and one batch whose rows belong to different caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from methods.core.contract import LayerCache, Step


class Shared(LayerCache):
    """One layer whose output is the leader's while the followers take in the same steps and settle for themselves.

    Right for followers whose prompt output equals the leader's: all that decide after the prompt (`changes_prompt`
    False) when the leader keeps everything.
    """

    def __init__(self, leader: LayerCache, followers: Sequence[LayerCache]):
        self.leader, self.followers = leader, followers

    def take(self, step: Step) -> None:
        for cache in (self.leader, *self.followers):
            cache.take(step)

    def attend(self, step: Step) -> Tensor:
        return self.leader.attend(step)

    def settle(self, step: Step) -> None:
        for cache in (self.leader, *self.followers):
            cache.settle(step)

    def tensors(self) -> Iterable[Tensor]:
        for cache in (self.leader, *self.followers):
            yield from cache.tensors()


class Rows(LayerCache):
    """One layer of a batch whose rows belong to different caches: each attends to its own.

    parts: (first row, row behind the last, cache), together the whole batch in order.
    """

    def __init__(self, parts: Sequence[tuple[int, int, LayerCache]]):
        self.parts = parts

    def take(self, step: Step) -> None:
        for first, end, cache in self.parts:
            cache.take(step.rows(slice(first, end)))

    def attend(self, step: Step) -> Tensor:
        return torch.cat([cache.attend(step.rows(slice(first, end))) for first, end, cache in self.parts])

    def settle(self, step: Step) -> None:
        for first, end, cache in self.parts:
            cache.settle(step.rows(slice(first, end)))

    def tensors(self) -> Iterable[Tensor]:
        for _, _, cache in self.parts:
            yield from cache.tensors()
