"""Cuts while decoding, as every eviction method takes them: `method.decode`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from methods.core.budget import Budget
from methods.core.errors import UserError
from methods.core.typed import Count, Range

PROMPTS = ("protected", "protected_free", "open")
EVERY = 128  # tokens between two cuts of a method that has no rule of its own, once a cap is typed


@dataclass(frozen=True)
class Decode:
    """When slots go after the prompt.

    cap: K, slots that a head is cut down to, whatever the prompt; it takes the place of the budget, which is 1 then.
    every: tokens between two cuts: K + every slots are cut down to K. None: as the method does by itself.
    prompt: of a cap: "protected", the prompt's slots stay and count in K; "protected_free", they stay beside K; "open",
        they may go, and K holds from the prompt's end on. None: "protected".
    """

    cap: Annotated[int, Range(least=2)] | None = None
    every: Count | None = None
    prompt: str | None = None

    @property
    def pins_prompt(self) -> bool:
        """Whether the prompt's slots stay."""
        return self.cap is not None and self.prompt != "open"

    @property
    def prompt_is_free(self) -> bool:
        """Whether the prompt's slots do not count in K."""
        return self.cap is not None and self.prompt == "protected_free"

    def plain(self) -> dict[str, Any]:
        """What is set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def check(self, budget: Budget, pin: str) -> None:
        """Raises UserError for a budget or a pin that a cap leaves nothing to say. pin: `method.pin` as typed."""
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise UserError(f"method.decode.prompt={self.prompt}: it is one of {', '.join(PROMPTS)}")
        if self.cap is None:
            if self.prompt is not None:
                raise UserError(
                    f"method.decode.prompt={self.prompt}: says what a cap does with the prompt; give "
                    "method.decode.cap=512 beside it, or leave it out"
                )
            return
        if not budget.is_off:
            raise UserError(
                f"method.decode.cap={self.cap}: {budget} says how many slots are held, too; give budget=1 "
                "with a cap, or leave the cap out"
            )
        if pin == "prompt" and self.prompt in ("open", "protected_free"):
            raise UserError(
                f"method.pin=prompt: method.decode.prompt={self.prompt} says otherwise; leave one of them out"
            )
        if pin not in ("own", "prompt") and self.pins_prompt:
            raise UserError(
                f"method.pin={pin}: method.decode.cap={self.cap} pins the prompt; method.decode.prompt=open leaves "
                "method.pin as it is"
            )

    def check_prompt(self, n: int) -> None:
        """Raises UserError for a prompt of n tokens that leaves no slot of the cap for what follows it."""
        if self.cap is not None and self.pins_prompt and not self.prompt_is_free and n >= self.cap:
            raise UserError(
                f"method.decode.cap={self.cap}: the prompt's {n} tokens stay and leave no slot for what is generated; "
                f"raise it above {n}, or give method.decode.prompt=protected_free or open"
            )
