"""What of some tensors any torch op reads, element by element: to hold what is counted against what is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: ops that read what they pick and not what they pick from
PICKS = ("gather", "index_select", "index", "take", "embedding", "_unsafe_index")


class Touched(TorchDispatchMode):
    """Marks elements of the tensors' storages that ops read inside the block; what is only written is not read."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.read = {}  # by storage: one mark for each element
        self.sizes = {}
        for x in tensors:
            where = x.untyped_storage().data_ptr()
            self.read[where] = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=torch.bool)
            self.sizes[where] = x.element_size()

    def nbytes(self) -> int:
        return sum(int(marks.sum()) * self.sizes[where] for where, marks in self.read.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = {x.untyped_storage().data_ptr() for x in tree_flatten(out)[0] if isinstance(x, Tensor)}
        for x in tree_flatten((args, kwargs or {}))[0]:
            where = x.untyped_storage().data_ptr() if isinstance(x, Tensor) else None
            if where not in self.read or where in made:  # a view, or written in place
                continue
            marks = self.read[where]
            if func.overloadpacket.__name__ in PICKS:
                ids = torch.arange(len(marks)).as_strided(x.shape, x.stride(), x.storage_offset())
                same = lambda one, x=x, ids=ids: ids if one is x else one  # noqa: E731
                marks[func(*tree_map(same, args), **tree_map(same, kwargs or {})).flatten()] = True
            else:
                marks.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        return out
