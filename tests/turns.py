"""Parameters that take turns: a part of all combinations in every run, the others among the slow ones."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def taking_turns(*values: Sequence[Any], of: int) -> list[Any]:
    """All combinations of the values, which may be marked. One in `of` is not slow; every value is in some of these."""
    found = []
    for places in product(*(range(len(some)) for some in values)):
        chosen = [some[place] for some, place in zip(values, places, strict=True)]
        plain = [one.values[0] if isinstance(one, PARAMETER) else one for one in chosen]
        marks = [mark for one in chosen if isinstance(one, PARAMETER) for mark in one.marks]
        found.append(pytest.param(*plain, marks=marks if sum(places) % of == 0 else [*marks, pytest.mark.slow]))
    return found


PARAMETER = type(pytest.param(0))
