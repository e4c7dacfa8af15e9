"""What subclasses in files of earlier versions fill in, by its name of today: they run, and are told in one line."""

import warnings
from collections.abc import Mapping


def adopt(cls: type, names: Mapping[str, str]) -> None:
    """Give what the class defines by an old name the new one; names: old -> new.

    For `__init_subclass__`, so that the line names where the class is defined. What calls an old name fails as usual.
    """
    old = [name for name in names if name in cls.__dict__]
    for name in old:
        if names[name] not in cls.__dict__:
            setattr(cls, names[name], cls.__dict__[name])
        delattr(cls, name)
    if old:
        renamed = ", ".join(f"`{name}` is `{names[name]}`" for name in old)
        said = f"{cls.__module__}.{cls.__qualname__}: {renamed} now; the old names will go"
        warnings.warn(said, FutureWarning, stacklevel=3)
