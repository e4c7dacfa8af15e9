"""One prompt pass for many caches, and one batch whose rows belong to different caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels import reads
from methods.core.contract import LayerCache, Stage, Step
from methods.core.meter import Meter


class Shared(LayerCache):
    """One layer whose output is the leader's while the followers append the same steps and compress for themselves.

    Right for followers whose prompt output equals the leader's: all that decide after the prompt (`changes_prompt`
    False) when the leader keeps everything.

    leader_stays: False frees the leader's layer as soon as the prompt has passed it, where nobody goes on from it.
    """

    def __init__(self, leader: LayerCache, followers: Sequence[LayerCache], leader_stays: bool = True):
        self.leader: LayerCache | None = leader
        self.followers, self.leader_stays = followers, leader_stays

    def append(self, step: Step) -> None:
        for cache in self._caches():
            cache.append(step)

    def attend(self, step: Step) -> Tensor:
        assert self.leader is not None, "the prompt has ended and its leader is gone"
        return self.leader.attend(step)

    def end_step(self, step: Step) -> None:
        if step.stage is Stage.ENDS_PROMPT and not self.leader_stays:
            self.leader = None
        for cache in self._caches():
            cache.end_step(step)

    def tensors(self) -> Iterable[Tensor]:
        for cache in self._caches():
            yield from cache.tensors()

    def _caches(self) -> list[LayerCache]:
        return [*([] if self.leader is None else [self.leader]), *self.followers]


class Rows(LayerCache):
    """One layer of a batch whose rows belong to different caches: each attends to its own.

    parts: (first row, row behind the last, cache), together the whole batch in order.
    """

    def __init__(self, parts: Sequence[tuple[int, int, LayerCache]]):
        self.parts = parts
        self.steps: list[Step] = []  # of the parts, while the layer's turn lasts

    def append(self, step: Step) -> None:
        self.steps = [step.rows(slice(first, end)) for first, end, _ in self.parts]
        for cache, part in self._each():
            cache.append(part)

    def attend(self, step: Step) -> Tensor:
        return torch.cat([cache.attend(part) for cache, part in self._each()])

    def end_step(self, step: Step) -> None:
        for cache, part in self._each():
            cache.end_step(part)
        self.steps = []

    def _each(self) -> Iterator[tuple[LayerCache, Step]]:
        """Every cache and its part of the step, whose reads are its rows'."""
        for (first, end, cache), part in zip(self.parts, self.steps, strict=True):
            with reads.of_rows(slice(first, end)):
                yield cache, part

    def expect(self, new: int) -> None:
        for _, _, cache in self.parts:
            cache.expect(new)

    def tensors(self) -> Iterable[Tensor]:
        for _, _, cache in self.parts:
            yield from cache.tensors()


class Unmetered(Meter):
    """Stands where the meter of a batch would: each member has its own."""

    def reading(self, step: Step) -> AbstractContextManager[None]:
        """Each member counts its own."""
        return nullcontext()

    def after_append(self, step: Step) -> None:
        """Nothing to count."""

    def before_end_pass(self, step: Step) -> None:
        """Nothing to count."""

    def after_end_step(self, step: Step) -> None:
        """Nothing to count."""
