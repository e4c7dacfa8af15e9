"""Plain data with one field made wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

NESTED = "nested"  # stands for lists in lists that no reader can follow
MISSING = object()
WRONG: dict[str, Any] = {
    "missing": MISSING, "null": None, "true": True, "-1": -1, "0": 0, "0.5": 0.5, "1e308": 1e308, "10 ** 400": 10**400,
    "nan": float("nan"), "inf": float("inf"), "text": "abc", "empty": "", "half": "\ud83d", "[]": [],
    "[1, null]": [1, None], "mapping": {"a": 1}, "mapping of null": {"": None}, "deep": NESTED,
}  # fmt: skip


def fields(value: Any) -> Iterator[tuple[str | int, ...]]:
    """The place of every field, of the first item of every list too, and of the whole: ()."""
    yield ()
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value[:1])
        for name, inner in inside:
            yield from ((name, *rest) for rest in fields(inner))


def changed(value: Any, place: tuple[str | int, ...], wrong: Any) -> Any:
    """A copy with another value in a place, or without it."""
    if not place:
        return None if wrong is MISSING else wrong
    made = copy.deepcopy(value)
    inner = made
    for name in place[:-1]:
        inner = inner[name]
    if wrong is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return made


def every(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(field, wrong value's name, the data with it), for all fields and all wrong values."""
    for place in fields(value):
        for label, wrong in WRONG.items():
            yield ".".join(map(str, place)), label, changed(value, place, wrong)


def text(value: Any) -> str:
    """As JSON, nested 100,000 deep where it is asked for."""
    return json.dumps(value).replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000)
