"""Objects from a configuration: a `_target_`, which names a class, and its arguments.

Only classes of a known kind are built: what a `_target_` names is a subclass of what its place asks for, a Method where
the group is `method`, and below it what the argument's annotation says, such as `store: Callable[..., Store]`. All of a
node is checked before any of it is called. Looking a class up means importing its module, which runs that module's
code: a module of Python's own library holds no such class and is not imported.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods.core.errors import UserError
from methods.core.home.users import load
from methods.core.typed import TARGET, conform, described, hints_of, known, no_target, shown

PARTIAL, CONVERT = "_partial_", "_convert_"


@dataclass(frozen=True)
class Part:
    """A class, and arguments that fit it.

    key: the setting that named it.
    partial: what is made takes the rest of its arguments when it is called.
    """

    key: str
    kind: type
    knobs: dict[str, Any]
    partial: bool = False

    def make(self, how: str | None = None) -> Any:
        """The object; how: the name of a class method that makes it. Raises UserError for all that the class raises."""
        knobs = {name: value.make() if isinstance(value, Part) else value for name, value in self.knobs.items()}
        if self.partial:
            return functools.partial(self.kind, **knobs)
        try:
            return (getattr(self.kind, how) if how else self.kind)(**knobs)
        except UserError:
            raise
        except Exception as error:  # a class of the user's own
            text = f"{self.key}: {self.kind.__name__}: {_told(error)}"
            raise UserError(text) from error


def check_part(node: Any, base: type, key: str, partial: bool = False) -> Part:
    """The class and the arguments that a plain mapping names; nothing is called.

    key: the setting that holds the mapping.  partial: whether its place wants what makes objects.
    Raises UserError for what is no mapping, names nothing of the kind, or has an argument that is unknown or unfit.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}={shown(node)}: give {key}=NAME, or a mapping with {TARGET}")
    if node.get(TARGET) is None:
        raise UserError(f"{key}.{TARGET}: is missing; it names a subclass of {_full(base)}")
    kind = resolve(node[TARGET], base, key)
    if bool(conform(node.get(PARTIAL, False), bool, f"{key}.{PARTIAL}")) is not partial:
        raise UserError(f"{key}.{PARTIAL}={shown(node.get(PARTIAL, False))}: give {shown(partial)}")
    arguments, more = arguments_of(kind)
    given = {name: value for name, value in node.items() if name not in (TARGET, PARTIAL, CONVERT)}
    if not more:
        known(given, arguments, key)
    knobs = {}
    for name, value in given.items():
        knobs[name] = _knob(value, arguments.get(name, (Any, False))[0], f"{key}.{name}")
    for name, (wanted, required) in arguments.items():
        if required and name not in given and not partial:
            raise UserError(f"{key}.{name}: is missing; give {described(wanted)}")
    return Part(key, kind, knobs, partial)


def resolve(target: Any, base: type, key: str) -> type:
    """The class of this name. Raises UserError unless it can be imported and is a subclass of `base`."""
    typed = f"{key}.{TARGET}={shown(target)}"
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UserError(f"{typed}: give the name of a class with its module, such as methods.snapkv.SnapKV")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{typed}: is no {base.__name__}; {key} takes a subclass of {_full(base)}")
    try:
        value = getattr(load(module), name)
    except Exception as error:  # whatever the module does while it is imported
        raise UserError(f"{typed}: cannot be imported ({_told(error)})") from error
    if not isinstance(value, type) or not issubclass(value, base):
        raise UserError(f"{typed}: is no {base.__name__}; {key} takes a subclass of {_full(base)}")
    if inspect.isabstract(value):
        raise UserError(f"{typed}: only says what a {base.__name__} is; give a subclass of it that can be run")
    return value


def arguments_of(kind: type) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """The arguments of a class by name, each with its type and whether it is required; and whether it takes others."""
    hints = hints_of(kind)
    if dataclasses.is_dataclass(kind):
        absent = dataclasses.MISSING
        fields = [field for field in dataclasses.fields(kind) if field.init]
        return {
            field.name: (hints[field.name], field.default is absent and field.default_factory is absent)
            for field in fields
        }, False
    arguments, more = {}, False
    for name, argument in inspect.signature(kind).parameters.items():
        if argument.kind is argument.VAR_KEYWORD:
            more = True
        elif argument.kind is not argument.VAR_POSITIONAL:
            arguments[name] = (hints.get(name, Any), argument.default is argument.empty)
    return arguments, more


def _knob(value: Any, wanted: Any, key: str) -> Any:
    """An argument that fits: a Part where the annotation names a class to build, else the value itself."""
    if isinstance(value, Mapping) and TARGET in value:
        for base, partial in _bases(wanted):
            return check_part(value, base, key, partial)
    no_target(value, key)
    return conform(value, wanted, key)


def _bases(wanted: Any) -> list[tuple[type, bool]]:
    """The class that an annotation asks for an object of, if it does; and whether for something that makes them."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _bases(args[0])
    if origin in (typing.Union, types.UnionType):
        return [base for option in args for base in _bases(option)]
    if origin is collections.abc.Callable:
        result = args[1] if len(args) > 1 else None
        return [(result, True)] if isinstance(result, type) and result.__module__ != "builtins" else []
    plain = isinstance(wanted, type) and origin is None and wanted.__module__ not in ("builtins", "types", "pathlib")
    return [(wanted, False)] if plain else []


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _told(error: Exception) -> str:
    """An error in one line, with its place unless its own words have one."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ValueError | ImportError | SyntaxError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text}, in {frame.filename}, line {frame.lineno}"
