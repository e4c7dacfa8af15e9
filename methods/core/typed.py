"""Values that a user gave, held against the types that the code declares for them.

A setting's type is the annotation of the argument it becomes; `Annotated` adds a `Range`, or words of its own for what
would work. Nothing is guessed: the one thing that is made another is a whole number where a text is wanted, since a
folder may be called 2024.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from methods.core.errors import UserError

LARGEST = 2**63 - 1  # of whole numbers: they become tensors and seeds
SHOWN = 80  # characters of a value in a message
TARGET = "_target_"

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping)
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number. least, most: allowed themselves; above: not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the number lies within."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        parts = [] if self.above is None else [f"above {self.above}"]
        parts += [] if self.least is None else [f"{self.least} or more"]
        return ", ".join(parts + ([] if self.most is None else [f"at most {self.most}"]))


@dataclass(frozen=True)
class Filled:
    """Of a text: it is not empty."""

    def holds(self, value: str) -> bool:
        """Whether the text has more than blanks."""
        return bool(value.strip())

    def __str__(self) -> str:
        return "not empty"


Folder = Annotated[str, Filled(), "a folder"]  # an empty path would be the working folder
Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]


class _Unfit(Exception):
    """The value is not of the type; what to say stands in `conform`."""


def conform(value: Any, wanted: Any, key: str) -> Any:
    """The value as a thing of the type `wanted`. Raises UserError: the key as typed, the value, what would work."""
    try:
        return _fit(value, wanted, key)
    except _Unfit:
        raise UserError(f"{key}={shown(value)}: give {described(wanted)}") from None


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of the type as it is, a number for a text aside."""
    try:
        return _fit(value, wanted, "") == value or value != value
    except (_Unfit, UserError):
        return False


def settings(node: Any, kind: type, key: str) -> dict[str, Any]:
    """Fields of the dataclass `kind` from a mapping, each of its type; those that are not given by their defaults.

    key: of the mapping, "" at the top. Raises UserError for what is no mapping, unknown, missing or of another type.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}={shown(node)}: give settings of it, such as {key}.{dataclasses.fields(kind)[0].name}")
    hints = hints_of(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    known(node, fields, key)
    values = {}
    for name, field in fields.items():
        full_key = f"{key}.{name}" if key else name
        if name in node:
            values[name] = conform(node[name], hints[name], full_key)
        elif field.default is not dataclasses.MISSING:
            values[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[name] = field.default_factory()
        else:
            raise UserError(f"{full_key}: is missing; give {described(hints[name])}")
    return values


def known(given: Iterable[Any], names: Iterable[str], key: str) -> None:
    """Raises UserError for the first of `given` that is no setting; key: of what has the settings, "" at the top."""
    names = list(names)
    for name in given:
        if name in names:
            continue
        before = f"{key}." if key else ""
        close = difflib.get_close_matches(str(name), names, 1)
        listed = f"{key} has {', '.join(names)}" if key else f"there are {', '.join(names)}"
        raise UserError(
            f"{before}{shown(str(name))}: no such setting; {f'did you mean {before}{close[0]}?' if close else listed}"
        )


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a class's arguments, resolved where they were written; Any for what cannot be."""
    annotated = kind if dataclasses.is_dataclass(kind) else kind.__init__
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # a name that is imported for type checkers only
        return collections.defaultdict(lambda: Any)


def no_target(value: Any, key: str) -> None:
    """Raises UserError for a `_target_` at any depth of a value from which nothing is built."""
    if isinstance(value, Mapping):
        if TARGET in value:
            raise UserError(f"{key}.{TARGET}={shown(value[TARGET])}: no such setting; nothing is built from it")
        for name, part in value.items():
            no_target(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            no_target(part, f"{key}[{i}]")


def shown(value: Any) -> str:
    """A value on one line, as it would be typed."""
    if isinstance(value, str):
        text = value if value.isprintable() else json.dumps(value)
    else:
        text = _typed(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def described(wanted: Any) -> str:
    """What a value of the type looks like, as the end of the sentence "give ..."."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        words = [one for one in args[1:] if isinstance(one, str)]
        return words[0] if words else ", ".join([described(args[0]), *map(str, args[1:])])
    if wanted in _SCALARS:
        return _SCALARS[wanted]
    if wanted is None:
        return "null"
    if origin in (typing.Union, types.UnionType):
        options = list(dict.fromkeys(described(one) for one in args))
        if "a number" in options and "a whole number" in options:
            options.remove("a whole number")
        return " or ".join(sorted(options, key=lambda option: option == "null"))
    if origin is typing.Literal:
        return f"one of {', '.join(map(_typed, args))}"
    if (origin or wanted) in _LISTS:
        inner = [one for one in args if one is not ...]
        return f"a list, each item {described(inner[0])}" if inner and inner[0] is not Any else "a list such as [1, 2]"
    if (origin or wanted) in _MAPPINGS:
        return "a mapping such as {name: value}"
    if wanted is Path:
        return "a path"
    if origin is collections.abc.Callable:
        result = args[1] if len(args) > 1 else Any
        return f"a mapping with _target_, the name of a {_name(result)}, and _partial_: true"
    if dataclasses.is_dataclass(wanted):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(wanted))}"
    return f"a mapping with _target_, the name of a {_name(wanted)}"


def _fit(value: Any, wanted: Any, key: str) -> Any:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or isinstance(wanted, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        fitted = _fit(value, args[0], key)
        number = isinstance(fitted, int | float) and not isinstance(fitted, bool)
        rules = Range if number else Filled if isinstance(fitted, str) else ()
        if not all(one.holds(fitted) for one in args[1:] if isinstance(one, rules)):
            raise _Unfit
        return fitted
    if origin in (typing.Union, types.UnionType):
        # a text last: it also takes numbers
        for option in sorted(args, key=lambda option: option is str):
            try:
                return _fit(value, option, key)
            except _Unfit:
                continue
        raise _Unfit
    if origin is typing.Literal:
        if not any(value == one and type(value) is type(one) for one in args):
            raise _Unfit
        return value
    if wanted in _SCALARS or wanted is None or wanted is Path:
        return _scalar(value, wanted)
    if (origin or wanted) in _LISTS:
        if not isinstance(value, (list, tuple)):
            raise _Unfit
        item = args[0] if args else Any
        items = [_fit(one, item, f"{key}[{i}]") for i, one in enumerate(value)]
        return tuple(items) if (origin or wanted) is tuple else items
    if (origin or wanted) in _MAPPINGS:
        if not isinstance(value, Mapping):
            raise _Unfit
        item = args[1] if len(args) > 1 else Any
        return {name: _fit(one, item, f"{key}.{name}") for name, one in value.items()}
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type) and isinstance(value, Mapping):
        return wanted(**settings(value, wanted, key))
    if isinstance(wanted, type) and isinstance(value, wanted):
        return value
    if origin is collections.abc.Callable and callable(value):
        return value
    raise _Unfit


def _scalar(value: Any, wanted: Any) -> Any:
    kind = type(value)
    if wanted is None or wanted is type(None):
        fits = value is None
    elif wanted is bool:
        fits = kind is bool
    elif wanted is int:
        fits = kind is int and abs(value) <= LARGEST
    elif wanted is float:
        fits = (kind is float and math.isfinite(value)) or (kind is int and abs(value) <= LARGEST)
    elif kind is int:
        return str(value)
    else:  # of the command line, bytes that are no UTF-8 come as halves of surrogate pairs
        fits = isinstance(value, wanted) or (wanted is Path and kind is str)
        fits = fits and "\0" not in str(value) and not any("\ud800" <= letter <= "\udfff" for letter in str(value))
    if not fits:
        raise _Unfit
    return value


def _typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_typed(one)}' for name, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_typed, value))}]"
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
