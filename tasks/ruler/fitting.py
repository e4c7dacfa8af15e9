"""How many units of haystack fit a length: RULER's bisection, and its shrinking of single samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from methods.core.errors import UserError


@dataclass(frozen=True)
class Sample:
    """context + question + prefix is the prompt.  outputs: references.  tokens: of prompt and answer together."""

    context: str
    question: str
    prefix: str
    outputs: list[str]
    tokens: int = 0

    @property
    def prompt(self) -> str:
        """Context, question and answer prefix, as one string."""
        return self.context + self.question + self.prefix


T = TypeVar("T", bound=Sample)


def most_units(cost: Callable[[int], int], limit: int, step: int, estimate_from: int, reach: int = 3) -> int:
    """The largest number of units found by bisection whose sample has at most `limit` tokens; `step` if none has.

    cost: tokens of a freshly drawn sample of so many units.  estimate_from: units of the sample that says how many
    tokens a unit takes.  reach: the bisection ends at so many times the estimate, or at two steps.
    """
    estimate = int(limit / (cost(estimate_from) / estimate_from))
    low, high, best = step, max(reach * estimate, 2 * step), step
    while low <= high:
        middle = (low + high) // 2
        if cost(middle) <= limit:
            low, best = middle + 1, middle
        else:
            high = middle - 1
    return best


def shrink(make: Callable[[int], T], units: int, limit: int, step: int, who: str) -> T:
    """A sample of `units`, or of so many steps less that it has at most `limit` tokens; never less than one step.

    Raises UserError if even that is too long.
    """
    while True:
        sample = make(units)
        if sample.tokens <= limit:
            return sample
        if units <= step:
            raise UserError(f"{who} takes {sample.tokens} tokens at least; task.lengths allows {limit}")
        units = max(step, units - step)
