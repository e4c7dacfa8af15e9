"""What subclasses in files of earlier versions fill in, by its name of today: they run, and are told in one line."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def unasked(cls: type, names: Sequence[str], why: str) -> None:
    """Tell in one line that what the class defines by these names is not called any more."""
    if old := [name for name in names if name in cls.__dict__]:
        names_of = ", ".join(f"`{name}`" for name in old)
        said = f"{cls.__module__}.{cls.__qualname__}: {names_of} is not asked any more: {why}"
        warnings.warn(said, FutureWarning, stacklevel=3)


def adopt(cls: type, names: Mapping[str, str], forms: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
    """Give what the class defines by an old name the new one, from `__init_subclass__`; names: old -> new.

    forms: what makes a function of before, whose arguments were others, one of today. A field of a dataclass may have
    an old name: it is a knob of the method's own. What calls an old name fails as usual.
    """
    fields = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    old = [name for name in names if name in cls.__dict__ and name not in fields]
    for name in old:
        value = cls.__dict__[name]
        if names[name] not in cls.__dict__:
            setattr(cls, names[name], forms[name](value) if forms and name in forms else value)
        delattr(cls, name)
    if old:
        renamed = ", ".join(f"`{name}` is `{names[name]}`" for name in old)
        said = f"{cls.__module__}.{cls.__qualname__}: {renamed} now; the old names will go"
        warnings.warn(said, FutureWarning, stacklevel=3)
