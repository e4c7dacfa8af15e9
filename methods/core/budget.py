"""A budget as typed, and the slots it stands for."""

import math
from dataclasses import dataclass

from methods.core.errors import UserError
from methods.core.typed import shown


def check_budget(budget: object) -> float | int:
    """The budget itself: a share of the prompt's slots in (0, 1], or a whole number of slots above 1.

    Raises UserError for anything else, naming what was given.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget):
        raise UserError(
            f"budget={shown(budget)}: give a share of the prompt such as budget=0.25, or slots such as budget=512"
        )
    if 0 < budget <= 1:
        return budget
    if budget > 1 and float(budget).is_integer():
        return int(budget)
    raise UserError(
        f"budget={budget}: a share lies in (0, 1], such as budget=0.25; a number of slots is whole and above 1, "
        "such as budget=512"
    )


@dataclass(frozen=True)
class Budget:
    """What a budget asks for; the only place that tells its forms apart.

    typed: as `check_budget` gives it: 1 is off, what is below a share of the prompt's slots, above a number of slots.
    key: what it was typed as.
    """

    typed: float | int
    key: str = "budget"

    def __str__(self) -> str:
        return f"{self.key}={self.typed:.12g}"

    @property
    def is_off(self) -> bool:
        """Whether all is kept."""
        return self.typed == 1

    @property
    def is_share(self) -> bool:
        """Whether it is a part of the prompt's slots, which grows with the prompt."""
        return self.typed < 1

    @property
    def number(self) -> int | None:
        """Slots, if a number of them was typed; None: it depends on the prompt."""
        return int(self.typed) if self.typed > 1 else None

    def within(self, n: int) -> bool:
        """Whether it is a number of slots that n would take up: at most n."""
        return self.number is not None and self.number <= n

    def share(self, n: int) -> float:
        """The part of a prompt of n tokens that it stands for."""
        return float(self.typed) if self.number is None else min(1.0, self.number / max(1, n))

    def slots(self, n: int) -> int:
        """Slots that it leaves of a prompt of n tokens, at most n; shares are cut, not rounded."""
        if self.number is not None:
            return min(self.number, n)
        return int(self.typed * n + 1e-9)  # 0.29 * 100 is 28.999999999999996


def share(budget: float | int, n: int) -> float:
    """The part of a prompt of n tokens that a budget stands for."""
    return Budget(budget).share(n)


def slots(budget: float | int, n: int) -> int:
    """Slots that `budget` leaves of a prompt of n tokens, at most n; shares are cut, not rounded."""
    return Budget(budget).slots(n)
