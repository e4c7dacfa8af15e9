"""The fields of a data row, held against their types."""

from collections.abc import Mapping
from typing import Annotated, Any

from methods.core.typed import Range, described, fits, shown

# answers, ids and the like: what a row may also give as a number
Text = str | int | float
Texts = list[Text]
Tokens = Annotated[int, Range(least=1), "a whole number of tokens, 1 or more"]

Depth = Annotated[float, Range(least=0, most=100), "a place in per cent, from 0 to 100"]


def wrong(row: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Why a row cannot be used, naming its field; None if every field is of its type. fields: types by name.

    A field that may be null may be missing.
    """
    for name, kind in fields.items():
        if not fits(row.get(name), kind):
            given = f"is {shown(row[name])}" if name in row else "is missing"
            return f"`{name}` {given}; it is {described(kind).removesuffix(' or null')}"
    return None


def empty(row: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Why a row cannot be used, naming its field: one that may not be null is blank, or a list that is empty or holds a
    blank; None if there is no such field. fields: types by name."""
    for name, kind in fields.items():
        value = row.get(name)
        parts = value if isinstance(value, list) else [value]
        blank = not parts or any(isinstance(one, str) and not one.strip() for one in parts)
        if blank and not fits(None, kind):
            return f"`{name}` is empty; it is {described(kind)}"
    return None
