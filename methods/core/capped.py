"""Eviction that goes on while decoding: a head never holds more than a fixed number of slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.core.allocate import Uniform
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache, EvictionContext, check_scores, on_device, taken
from methods.core.store import Store

EVICT = ("prompt_end", "per_chunk")


@dataclass
class Capped(Eviction):
    """Drops the slots that are worth least: when the prompt ends, and from then on as each token comes in.

    budget: 1 drops nothing, ever; a number of slots is also what a shorter prompt grows to.
    evict: "prompt_end": the prompt attends in full before the first drop. "per_chunk": slots also go after every chunk
        of the prompt; in chunks of one token, token by token.
    """

    keeps_limit: ClassVar[bool] = True

    evict: str = "prompt_end"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evict not in EVICT:
            raise UserError(f"{type(self).__name__}: method.evict={self.evict}; it is {' or '.join(EVICT)}")
        if self.budget > 1 and type(self.allocator) is not Uniform:
            raise UserError(
                f"{self.name}: budget={self.budget:g} with method.allocator={type(self.allocator).__name__}: how far a "
                "head of a short prompt may grow is not known; give a share in (0, 1]"
            )

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """Slots dropped inside the prompt are missed by the rest of it."""
        return self.evict == "per_chunk"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [CappedCache(self, prompt_len) for _ in range(spec.n_layers)]

    def slots(self, n: int) -> int:
        return max(1, super().slots(n))

    def cap(self, n: int) -> int:
        """Most slots that a head holds after any token that follows a prompt of n."""
        return self.slots(n) if self.budget <= 1 else int(self.budget)

    def refill(self, n: int) -> int:
        """Slots that a head starts again from once it holds more than `cap`; the same number unless overridden."""
        return self.cap(n)

    def worth(self, store: Store, step: Step, room: Tensor, mass: Tensor | None) -> Tensor:
        """What each slot is worth, [B, H, S]: the least goes first, at equal worth the newest; +inf stays, never -inf.

        room [B, 1, 1]: slots that stay; mass [B, Hq, S]: what `n_window_queries` asked for. Padding need not be looked
        at. Slots do not lie in order of position: a new token takes a freed place. It must not make the host wait.
        """
        raise NotImplementedError

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        room = on_device(cut.limit, store.pos.device)[:, None, None]
        return self.rank(store, step, room, cut.mass)

    def rank(self, store: Store, step: Step, room: Tensor, mass: Tensor | None) -> Tensor:
        """`worth`, where a sliding layer first lets go of what no later query sees."""
        worth = self.worth(store, step, room, mass)
        if step.rules.window is None:
            return worth
        unseen = store.pos <= step.pos[:, -1:, None] - step.rules.window + 1  # [B, H, S]
        return worth.masked_fill(unseen, torch.finfo(worth.dtype).min)


class CappedCache(EvictionCache):
    """One layer whose next token takes the place of the slot that is worth least."""

    method: Capped

    def __init__(self, method: Capped, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.cap: list[int] = []  # of each row, once the prompt has ended; empty: there is none
        self.refill: list[int] = []
        self.held: list[int] = []  # slots of each row's fullest head
        self.caps: Tensor | None = None  # the same as cap, [B, 1]
        self.columns = 0  # of the prompt so far, padding included

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.cap, self.refill, self.held = (taken(x, rows) for x in (self.cap, self.refill, self.held))
        self.caps = None if self.caps is None else self.caps.index_select(0, rows)

    def _decide(self, step: Step) -> None:
        if step.stage is Stage.ENDS_PROMPT:
            self._end_prompt(step)
        elif step.stage is Stage.MID_PROMPT:
            if self.method.changes_prompt and self.method.budget != 1:
                self._inside_prompt(step)
        elif self.cap:
            self._go_on(step)

    def _go_on(self, step: Step) -> None:
        """After tokens that follow the prompt: rows above their cap drop."""
        if step.stage is Stage.DECODE:
            self.held = [n + 1 for n in self.held]
        else:
            self.held = self._count()
        over = [n > cap for n, cap in zip(self.held, self.cap, strict=True)]
        if not any(over):
            return
        by_one = all(n <= cap + 1 for n, cap in zip(self.held, self.cap, strict=True)) and self.refill == self.cap
        if step.stage is Stage.DECODE and by_one and len(self.store) > max(self.cap):
            self._drop_one(step, over)
            self.held = [n - o for n, o in zip(self.held, over, strict=True)]
        else:
            held = self.held
            self.held = self.limit = [refill if o else n for n, refill, o in zip(held, self.refill, over, strict=True)]
            self._drop(step, held)

    def _end_prompt(self, step: Step) -> None:
        super()._end_prompt(step)
        if self.method.budget == 1:
            return
        self.held = self._count()
        self.cap, self.refill = self._caps(step, self.prompt)
        self.caps = on_device(self.cap, step.pos.device)[:, None]
        self.store.most = max(self.cap) + 1

    def _limits(self, step: Step) -> list[int]:
        if self.method.changes_prompt and self.method.budget != 1:  # the prompt's last token is like any other
            return self._after_token(step, self.prompt)
        return super()._limits(step)

    def _inside_prompt(self, step: Step) -> None:
        """A chunk has been read: rows above the cap that the whole prompt will have drop, as they do while decoding."""
        self.columns += step.q.shape[2]
        assert self.prompt_len is not None, "a prompt in one piece has no middle"
        read = (step.pos.amax(-1) + 1).tolist()  # tokens per row; its padding has all come before them
        whole = [_within(self.prompt_len - self.columns + n, step.rules.window) for n in read]
        self.limit = self._after_token(step, whole)
        self._drop(step)

    def _after_token(self, step: Step, prompt: list[int]) -> list[int]:
        """Slots that rows with prompts of so many tokens keep of what they hold now."""
        held = self._count()
        return [refill if n > cap else n for n, cap, refill in zip(held, *self._caps(step, prompt), strict=True)]

    def _caps(self, step: Step, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Each row's cap, and what it starts again from above it."""
        share, window = self.method.allocator.slots, step.rules.window
        cap, refill = (
            [_within(share(step.layer, step.n_layers, of(n)), window) for n in prompt]
            for of in (self.method.cap, self.method.refill)
        )
        return cap, refill

    def _drop_one(self, step: Step, over: list[bool]) -> None:
        """Free the slot of every head that is worth least, for the next token to take.

        over: rows that hold more than their cap; the others have a free place already.
        """
        store = self.store
        assert self.caps is not None
        real = store.pos >= 0  # [B, H, S]
        worth = self.method.rank(store, step, self.caps[..., None], self.mass)
        if worth.device.type == "cpu":  # elsewhere a look waits for the device
            check_scores(self.method, worth.masked_fill(~real, -torch.inf), real)
        worth = worth.masked_fill(~real, torch.inf)
        least = worth == worth.amin(-1, keepdim=True)
        slot = torch.where(least, store.pos, -1).argmax(-1)  # [B, H], the newest of them
        if store.padded:  # a row that is not full has a free place already
            free = (~real).to(torch.int8).argmax(-1)
            slot = torch.where(real.sum(-1) > self.caps, slot, free)
        store.drop(slot, over)


def whole_slots(share: float, room: Tensor) -> Tensor:
    """Whole slots that a share of `room` slots comes to, cut as `budget.slots` does; float32 is not exact enough."""
    return (share * room.double() + 1e-9).long()


def _within(n: int, window: int | None) -> int:
    """At most what the next query of a sliding layer sees."""
    return n if window is None else min(n, window - 1)
