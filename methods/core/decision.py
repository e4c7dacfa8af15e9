"""A decision to drop slots: what a score is given to look at, and what is asked of the scores that it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from methods.core.contract import Step
from methods.core.errors import UserError

if TYPE_CHECKING:
    from methods.core.store import Store

Value = TypeVar("Value")


@dataclass
class EvictionContext:
    """A decision to drop slots, as `score` sees it.

    q [B, Hq, T, D], q_pos [B, T]: the newest queries, as many as `Eviction.query_window` asked for where there are so
    many; position -1 is padding.
    real [B, H, S]: which slots are no padding.
    prompt: tokens of each row's prompt in this layer (in a sliding layer those inside its window).
    kept_per_head: slots that may stay per head, for each row.  budget_slots [B, 1, 1]: the same on the device.
    mass [B, Hq, S]: what `Eviction.n_window_queries` asked for in the step that decides; None if it asked for nothing.
    again: whether the rows have been cut before.
    mean_kept: slots that may stay per head, for each row, on average over layers and heads; empty: `kept_per_head`.
    prompt_end [B, 1, 1]: tokens of each row up to its prompt's end; None before that.
    """

    q: Tensor
    q_pos: Tensor
    real: Tensor
    prompt: list[int]
    kept_per_head: list[int]
    budget_slots: Tensor
    mass: Tensor | None = None
    again: bool = False
    mean_kept: list[int] = field(default_factory=list)
    prompt_end: Tensor | None = None
    _ranked: Tensor = field(init=False, repr=False)  # what ranks the slots that are not pinned, once it is known

    def __post_init__(self) -> None:
        self.mean_kept = self.mean_kept or self.kept_per_head

    @cached_property
    def n(self) -> Tensor:
        """Slots that each head holds, [B, H, 1]."""
        return self.real.sum(-1, keepdim=True)

    @cached_property
    def age_rank(self) -> Tensor:
        """How many older slots the head holds, [B, H, S], -1 for padding; where slots lie in order of position."""
        return torch.where(self.real, self.real.cumsum(-1) - 1, -1)

    def ranks(self, store: Store) -> Tensor:
        """`age_rank` wherever the slots of the store lie."""
        if store.in_order:
            return self.age_rank
        padding = self.real.shape[-1] - self.n  # of position -1, so that it comes before all slots
        return torch.where(self.real, store.pos.argsort(-1).argsort(-1) - padding, -1)

    @property
    def rank(self) -> Tensor:
        """What `age_rank` was called."""
        return self.age_rank

    @property
    def limit(self) -> list[int]:
        """What `kept_per_head` was called."""
        return self.kept_per_head


def check_scores(score: Callable[..., Tensor], scores: Tensor, real: Tensor) -> None:
    """Raises FloatingPointError that names the place of a method's `score` if its scores rank nothing.

    scores [B, H, S]: -inf for padding.  real [B, H, S]: what is no padding. A row may score some slots -inf, not all.
    """
    broken = int(scores.isnan().sum())
    nothing = bool(((scores == -torch.inf).all(-1).all(-1) & real.any(-1).any(-1)).any())
    if not broken and not nothing:
        return
    code = inspect.unwrap(score).__code__
    what = f"NaN for {broken} of {int(real.sum())} slots" if broken else "-inf for all slots of a row"
    raise FloatingPointError(f"{code.co_name} gave {what}: {code.co_filename}, line {code.co_firstlineno}")


def check_unpinned(score: Callable[..., Tensor], scores: Tensor, real: Tensor, pin: str) -> None:
    """Raises UserError if a method's `score` keeps slots by +inf, which no other pins could take the place of."""
    if bool(((scores == torch.inf) & real).any()):
        code = inspect.unwrap(score).__code__
        raise UserError(
            f"method.pin={pin}: {code.co_name} gives +inf to what shall stay ({code.co_filename}, line "
            f"{code.co_firstlineno}), which no pins can take the place of; let `protected` say it, or give "
            "method.pin=own"
        )


def joined(queries: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Queries [B, Hq, T, D] and their positions [B, T] of several steps as of one."""
    if len(queries) == 1:
        return queries[0]
    q, pos = zip(*queries, strict=True)
    return torch.cat(q, dim=2), torch.cat(pos, dim=1)


def newest(q: Tensor, pos: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The newest n queries of each row, q [B, Hq, T, D] and pos [B, T], padding before them where there are fewer."""
    order = (pos >= 0).to(torch.int8).argsort(dim=-1, stable=True)[:, -n:]  # [B, n]
    at = order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, at), pos.gather(1, order)


def real_tokens(step: Step) -> list[int]:
    """Tokens of each row in the step, without padding; waits for the device where there is some."""
    if not step.padded:
        return [step.q.shape[2]] * len(step.pos)
    return (step.pos >= 0).sum(-1).tolist()


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """One number per row, [B], written there by the device itself: a copy from the host would be waited for."""
    return torch.stack([torch.full((), n, device=device) for n in numbers])


def taken(values: list[Value], rows: Tensor) -> list[Value]:
    """Of one value per row those of rows [B]; the device is waited for only where they differ."""
    if len(set(values)) < 2:
        return values[:1] * len(rows)
    return [values[row] for row in rows.tolist()]
