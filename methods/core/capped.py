"""Eviction that goes on while decoding: a head never holds more than a fixed number of slots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import lowest
from methods.core.allocate import Uniform
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.decision import EvictionContext, check_scores, on_device, taken
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache
from methods.core.store import Store

EVICT = ("prompt_end", "per_chunk")


def _by_context(worth: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`score` for a method of before, whose `worth` was given these two parts of the context."""

    @functools.wraps(worth)
    def score(self: Eviction, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return worth(self, store, step, cut.budget_slots, cut.mass)

    return score


@dataclass
class Capped(Eviction):
    """Drops the slots that score lowest: when the prompt ends, and from then on as each token comes in.

    budget: 1 drops nothing, ever; a number of slots is also what a shorter prompt grows to.
    evict: "prompt_end": the prompt attends in full before the first drop. "per_chunk": slots also go after every chunk
        of the prompt; in chunks of one token, token by token.
    """

    _old_names: ClassVar = Eviction._old_names | {"worth": "score", "cap": "capacity", "refill": "target_size"}
    _old_forms: ClassVar = {"worth": _by_context}

    fills_budget: ClassVar[bool] = True

    evict: str = "prompt_end"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evict not in EVICT:
            raise UserError(f"{type(self).__name__}: method.evict={self.evict}; it is {' or '.join(EVICT)}")
        if self.request.number and type(self.allocator) is not Uniform:
            raise UserError(
                f"{self.name}: {self.request} with method.allocator={type(self.allocator).__name__}: how far a "
                "head of a short prompt may grow is not known; give a share in (0, 1]"
            )

    @property
    def drops_later(self) -> bool:
        return not self.request.is_off

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """Slots dropped inside the prompt are missed by the rest of it."""
        return self.evict == "per_chunk"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [CappedCache(self, prompt_len) for _ in range(spec.n_layers)]

    def slots(self, n: int) -> int:
        return max(1, super().slots(n))

    def capacity(self, n: int) -> int:
        """Most slots that a head holds after any token that follows a prompt of n."""
        return self.request.number or self.slots(n)

    def target_size(self, n: int) -> int:
        """Slots that a head starts again from once it holds more than `capacity`; the same number unless overridden."""
        return self.capacity(n)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Scores [B, H, S]: the lowest goes first, at equal scores the newest; never -inf.

        Asked for after every token of a full cache, so it must not make the host wait. Slots do not lie in order of
        position then: a new token takes a freed place, and `store.pos` says how old a slot is. Padding need not be
        looked at.
        """
        raise NotImplementedError


class CappedCache(EvictionCache):
    """One layer whose next token takes the place of the slot that scores lowest."""

    method: Capped

    def __init__(self, method: Capped, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.capacity: list[int] = []  # of each row, once the prompt has ended; empty: there is none
        self.target_size: list[int] = []
        self.held: list[int] = []  # slots of each row's fullest head
        self.capacity_there: Tensor | None = None  # the same as capacity, on the device, [B, 1]
        self.columns = 0  # of the prompt so far, padding included

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        sizes = (self.capacity, self.target_size, self.held)
        self.capacity, self.target_size, self.held = (taken(x, rows) for x in sizes)
        self.capacity_there = None if self.capacity_there is None else self.capacity_there.index_select(0, rows)

    def _decide(self, step: Step) -> None:
        if step.stage is Stage.ENDS_PROMPT:
            self._end_prompt(step)
        elif step.stage is Stage.MID_PROMPT:
            if self.method.changes_prompt and not self.method.request.is_off:
                self._inside_prompt(step)
        elif self.capacity:
            self._go_on(step)

    def _go_on(self, step: Step) -> None:
        """After tokens that follow the prompt: rows above their capacity drop."""
        if step.stage is Stage.DECODE:
            self.held = [n + 1 for n in self.held]
        else:
            self.held = self._count()
        above = [n - capacity for n, capacity in zip(self.held, self.capacity, strict=True)]
        over = [n > 0 for n in above]
        if not any(over):
            return
        by_one = max(above) == 1 and self.target_size == self.capacity
        if step.stage is Stage.DECODE and by_one and len(self.store) > max(self.capacity):
            self._drop_one(step, over)
            self.held = [n - o for n, o in zip(self.held, over, strict=True)]
        else:
            held = self.held
            self.held = [target if o else n for n, target, o in zip(held, self.target_size, over, strict=True)]
            self.kept_per_head = self.held
            self._drop(step, held)

    def _end_prompt(self, step: Step) -> None:
        super()._end_prompt(step)
        if self.method.request.is_off:
            return
        self.held = self._count()
        self.capacity, self.target_size = self._sizes_for(step, self.prompt, decoding=True)
        if step.rules.window is not None and min(self.capacity) >= step.rules.window - 1:
            self.capacity = []  # no query sees more than that anyway
            return
        self.capacity_there = on_device(self.capacity, step.pos.device)[:, None]
        self.store.cap(max(self.capacity) + 1)

    def _kept_after_prompt(self, step: Step) -> list[int]:
        if self.method.changes_prompt and not self.method.request.is_off:  # the prompt's last token is like any other
            return self._after_token(step, self.prompt)
        return super()._kept_after_prompt(step)

    def _inside_prompt(self, step: Step) -> None:
        """A chunk has been read: rows above the whole prompt's capacity drop, as they do while decoding."""
        self.columns += step.q.shape[2]
        assert self.prompt_len is not None, "a prompt in one piece has no middle"
        read = (step.pos.amax(-1) + 1).tolist()  # tokens per row; its padding has all come before them
        whole = [_within(self.prompt_len - self.columns + n, step.rules.window) for n in read]
        self.kept_per_head = self._after_token(step, whole)
        self._drop(step)

    def _after_token(self, step: Step, prompt: list[int]) -> list[int]:
        """Slots that rows with prompts of so many tokens keep of what they hold now."""
        held = self._count()
        sizes = self._sizes_for(step, prompt)
        return [target if n > capacity else n for n, capacity, target in zip(held, *sizes, strict=True)]

    def _sizes_for(self, step: Step, prompt: list[int], decoding: bool = False) -> tuple[list[int], list[int]]:
        """Each row's capacity, and what it starts again from above it; decoding: from the prompt's end on."""
        method, window = self.method, step.rules.window
        capacity, target_size = (  # the latter last: it is what a cut leaves
            [_within(n, window) for n in self._kept_here(step, [of(n) for n in prompt], prompt)]
            for of in (method.capacity, method.target_size)
        )
        if decoding and method.decode.every:
            more = method.decode.every - 1
            return [_within(n + more, window) for n in target_size], target_size
        return [max(n, m) for n, m in zip(capacity, target_size, strict=True)], target_size

    def _let_go(self, step: Step, next_query: Tensor) -> None:
        """Nothing once slots have been dropped: those that no query sees are the next to go, one for each token."""
        if not self.dropped:
            super()._let_go(step, next_query)

    def _scores(self, step: Step, cut: EvictionContext) -> Tensor:
        """The scores; a sliding layer first lets go of what no later query sees."""
        scores = super()._scores(step, cut)
        if step.rules.window is None:
            return scores
        unseen = self.store.pos <= step.pos[:, -1:, None] - step.rules.window + 1  # [B, H, S]
        return scores.masked_fill(unseen, torch.finfo(scores.dtype).min)

    def _drop_one(self, step: Step, over: list[bool]) -> None:
        """Free the slot of every head that scores lowest, for the next token to take.

        over: rows that hold more than their capacity; the others have a free place already.
        """
        store = self.store
        assert self.capacity_there is not None
        real = store.pos >= 0  # [B, H, S]
        budget_slots = self.capacity_there[..., None]
        context = EvictionContext(
            step.q, step.pos, real, self.prompt, self.capacity, budget_slots, self.mass, True, *self._of_pins()
        )
        scores = self._scores(step, context)
        slot, odd = lowest(scores, store.pos)  # [B, H]
        if odd:
            check_scores(self.method.score, context._ranked.masked_fill(~real, -torch.inf), real)
        if store.padded:  # a row that is not full has a free place already
            free = (~real).to(torch.int8).argmax(-1)
            slot = torch.where(real.sum(-1) > self.capacity_there, slot, free)
        if type(self.method).before_drop is not Eviction.before_drop:  # a mask of all slots, for those that look
            self.method.before_drop(store, real.scatter(2, slot[..., None], False))
        store.drop(slot, over)
        store.lose(over)
        self.dropped = True


def whole_slots(share: float, slots: Tensor) -> Tensor:
    """Whole slots that a share of so many comes to, cut as `budget.slots` does; float32 is not exact enough."""
    return (share * slots.double() + 1e-9).long()


def _within(n: int, window: int | None) -> int:
    """At most what the next query of a sliding layer sees."""
    return n if window is None else min(n, window - 1)
