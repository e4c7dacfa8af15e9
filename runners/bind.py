"""The binding as it was found here before it moved to methods/core: names that code of others may import."""

from methods.core.bind import bind, unbound
from methods.core.cache import KVCache

__all__ = ["KVCache", "bind", "unbound"]
