"""What subclasses in files of earlier versions fill in, by its name of today: they run, and are told in one line."""

import inspect
import warnings
from collections.abc import Mapping


def adopt(cls: type, names: Mapping[str, str]) -> None:
    """Give what the class defines by an old name the new one; names: old -> new.

    For `__init_subclass__`, so that the line names where the class is defined. A field of a dataclass may be called
    so, which is a knob of the method's own. What calls an old name fails as usual.
    """
    fields = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    old = [name for name in names if name in cls.__dict__ and name not in fields]
    for name in old:
        if names[name] not in cls.__dict__:
            setattr(cls, names[name], cls.__dict__[name])
        delattr(cls, name)
    if old:
        renamed = ", ".join(f"`{name}` is `{names[name]}`" for name in old)
        said = f"{cls.__module__}.{cls.__qualname__}: {renamed} now; the old names will go"
        warnings.warn(said, FutureWarning, stacklevel=3)
