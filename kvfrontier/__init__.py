"""KV-cache methods as a library: `from kvfrontier import load_method`. The command is kvfrontier/command.py.

In a wheel this package holds the folders of the checkout as well (package/wheel.py).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods import load_method, method_names

__all__ = ["load_method", "method_names"]


def __getattr__(name: str) -> Any:
    """The names above, looked up when they are first used: reading records needs nothing that methods need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import methods

    return getattr(methods, name)
