"""Pins: slots that stay whatever they score. They count inside the budget.

What a score is worth shows against a die that may not touch the same slots, so every eviction method takes the same
pins (Garcia 2026, arXiv:2605.18053; arXiv:2609.03430): `method.pin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from methods.core.budget import Budget
from methods.core.decision import EvictionContext, on_device
from methods.core.errors import NotHere, UserError
from methods.core.store import Store
from methods.core.typed import Share, settings, shown

KINDS = ("own", "none", "boundary", "prompt")
ENDS = ("moving", "prompt")
LEAST = 4  # slots on a side of the boundary that pins any


@dataclass(frozen=True)
class Pin:
    """Which slots of a head stay whatever they score.

    at: "own": those that the method protects by itself; "none": none; "boundary": the first and the newest; "prompt":
        all of the prompt, for cuts while decoding.
    first, newest: of the boundary, shares of the slots that a head keeps, at least 4 slots each; 0 pins none there.
    end: the boundary's newest slots are those held at the cut ("moving"), or the prompt's last for good ("prompt").
    """

    at: str = "own"
    first: Share = 0.10
    newest: Share = 0.10
    end: str = "moving"

    def __post_init__(self) -> None:
        if self.at not in KINDS:
            raise UserError(f"method.pin={shown(self.at)}: it is one of {', '.join(KINDS)}")
        if self.end not in ENDS:
            raise UserError(f"method.pin.end={shown(self.end)}: it is one of {', '.join(ENDS)}")
        if self.at != "boundary" and not self._is_plain:
            raise UserError(f"method.pin.at={self.at}: takes no shares and no end; method.pin.at=boundary does")
        if not 0 <= self.first + self.newest < 1 or min(self.first, self.newest) < 0:
            raise UserError(
                f"method.pin.first={self.first:g}, method.pin.newest={self.newest:g}: of any number of slots these pin "
                "all; they are shares that leave some, such as 0.1 and 0.1"
            )

    @classmethod
    def of(cls, given: Pin | str | Mapping[str, Any]) -> Pin:
        """A pin as typed: its name, or a mapping of its fields. Raises UserError for one that cannot work."""
        if isinstance(given, Pin):
            return given
        return cls(given) if isinstance(given, str) else cls(**settings(given, cls, "method.pin"))

    @property
    def _is_plain(self) -> bool:
        return all(getattr(self, field.name) == field.default for field in fields(self) if field.name != "at")

    @property
    def is_own(self) -> bool:
        """Whether the method's own protection holds."""
        return self.at == "own"

    def plain(self) -> str | dict[str, Any]:
        """As it would be typed: its name alone where nothing else is set."""
        return self.at if self._is_plain else asdict(self)

    def check(self, budget: Budget, decodes: bool) -> None:
        """Raises NotHere where pins would take all slots of every prompt; decodes: slots also go while decoding."""
        if self.at == "prompt" and (not decodes or budget.number is None):
            why = "drops slots at the prompt's end only" if budget.number else "keeps a part of the prompt's slots"
            raise NotHere(
                f"method.pin=prompt: {budget} {why}, and all of the prompt's are pinned; give a number "
                "of slots above the prompt's, such as budget=4096, and a method that also drops while decoding"
            )
        if budget.within(pinned := sum(self.sizes(budget.number or 0))):
            raise NotHere(
                f"method.pin={self.at}: pins {pinned} slots, and {budget} holds no other beside them; "
                f"raise it to {self.held(int(budget.typed), 0)}, or lower method.pin.first or method.pin.newest"
            )

    def sizes(self, kept: int) -> tuple[int, int]:
        """First and newest slots that the boundary pins where a head keeps so many."""
        if self.at != "boundary":
            return 0, 0
        first, newest = (max(LEAST, int(share * kept + 1e-9)) if share else 0 for share in (self.first, self.newest))
        return first, newest

    def taken(self, kept: int, prompt: int) -> int:
        """Slots that are pinned where a head keeps so many, of a prompt of so many tokens."""
        return prompt if self.at == "prompt" else sum(self.sizes(kept))

    def held(self, kept: int, prompt: int) -> int:
        """Slots that a head keeps where its budget leaves `kept`: never fewer than the pins and one beside them."""
        while not self.is_own and kept <= (pinned := self.taken(kept, prompt)):
            kept = pinned + 1
        return kept

    def mask(self, store: Store, cut: EvictionContext) -> Tensor | None:
        """The slots [B, H, S] that these pins hold at a cut; None for none, and for the method's own."""
        pos = store.pos
        if self.at == "prompt":
            return cut.real if cut.prompt_end is None else cut.real & (pos < cut.prompt_end)
        if self.at != "boundary":
            return None
        sizes = [self.sizes(kept) for kept in cut.mean_kept]
        first, newest = (_numbers(column, pos.device) for column in zip(*sizes, strict=True))
        rank, n = cut.ranks(store), cut.n
        end = n
        if self.end == "prompt" and cut.prompt_end is not None:
            end = (cut.real & (pos < cut.prompt_end)).sum(-1, keepdim=True)
        return (rank >= 0) & ((rank < first) | ((rank >= end - newest) & (rank < end)))


def _numbers(values: Sequence[int], device: torch.device) -> Tensor | int:
    """One number per row as [B, 1, 1], or as itself where the rows have the same."""
    return values[0] if len(set(values)) == 1 else on_device(values, device)[:, None, None]
