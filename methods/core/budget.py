"""A budget as typed, and the slots it stands for."""

import math

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


def share(budget: float | int, n: int) -> float:
    """The part of a prompt of n tokens that a budget stands for."""
    return budget if budget <= 1 else min(1.0, budget / max(1, n))


def slots(budget: float | int, n: int) -> int:
    """Slots that `budget` leaves of a prompt of n tokens, at most n; shares are cut, not rounded."""
    if budget > 1:
        return min(int(budget), n)
    return int(budget * n + 1e-9)  # 0.29 * 100 is 28.999999999999996
