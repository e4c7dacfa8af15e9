"""What a form of code is, and how codes are held: in arrays that grow with the tokens, or stand for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kernels import reads
from methods.core.stores.packed import GrowableBuffer

Arrays = Mapping[str, Tensor]


class Form:
    """Numbers [b, H, n, D] as packed bytes and back. Unchanged while running: what it learned came with it.

    An array has tokens, or whole groups of them, on dimension 2, unless its name is in `fixed`.
    """

    #: a token's code depends on the token alone: codes of later tokens may be put behind, and single ones dropped
    per_token: ClassVar[bool] = True
    #: arrays that stand for all tokens that were packed together
    fixed: ClassVar[frozenset[str]] = frozenset()

    @property
    def bits(self) -> float:
        """Nominal bits of a number: its code alone, without scales, outliers and the like."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Arrays of x [b, H, n, D], whose arithmetic is float32."""
        raise NotImplementedError

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        """The numbers that the arrays stand for, [b, H, n, D], float32."""
        raise NotImplementedError

    def nbytes(self, n: int, H: int, D: int) -> int:
        """Bytes of n tokens of H heads of this width."""
        raise NotImplementedError

    def parameters(self) -> Iterable[Tensor]:
        """Codebooks, levels, matrices: what comes with the method and not with the sequence."""
        return ()

    def effective_bits(self, n: int, H: int, D: int) -> float:
        """Bits of a number with all that is held of n tokens."""
        return 8 * self.nbytes(n, H, D) / (n * H * D)


class Coded:
    """Codes of some tokens of all rows of a part."""

    def __init__(self, form: Form, x: Tensor):
        """x [b, H, n, D]: what is to be packed."""
        arrays = form.encode(x.float())
        self.form, self.heads, self.D, self.n, self.dtype = form, x.shape[1], x.shape[-1], x.shape[2], x.dtype
        self.growing = {name: GrowableBuffer(a) for name, a in arrays.items() if name not in form.fixed}
        self.fixed = {name: a for name, a in arrays.items() if name in form.fixed}

    def read(self) -> Tensor:
        """The numbers, [b, H, n, D], in the type that they came in."""
        arrays = {**{name: a.used for name, a in self.growing.items()}, **self.fixed}
        numbers = self.form.decode(arrays, self.D).to(self.dtype)
        reads.instead(numbers, *arrays.values())
        return numbers

    def join(self, later: Coded, to_come: int | None) -> bool:
        """Put later tokens behind, where the form allows it; to_come: tokens that will still be packed."""
        if later.form is not self.form or not self.form.per_token:
            return False
        for name, a in self.growing.items():
            a.append(later.growing[name].used, later.n, to_come)
        self.n += later.n
        return True

    def keep(self, slots: Tensor) -> None:
        """Only these tokens, [b, H, n]. Raises NotImplementedError where one token's code is another's too."""
        self.check_drops()
        for name, a in self.growing.items():
            index = slots[..., None].expand(*slots.shape, a.used.shape[-1])
            self.growing[name] = GrowableBuffer(a.used.gather(2, index))
        self.n = slots.shape[2]

    def check_drops(self) -> None:
        """Raises NotImplementedError where single tokens of a head cannot be dropped."""
        name = type(self.form).__name__
        if not self.form.per_token:
            raise NotImplementedError(f"{name}: cannot drop single slots once they are packed, a scale is of several")
        if any(a.used.shape[1] != self.heads for a in self.growing.values()):
            raise NotImplementedError(f"{name}: cannot drop single slots of a head, a code is of all heads")

    def select(self, rows: Tensor) -> Coded:
        """These rows, in memory of their own."""
        twin = copy.copy(self)
        twin.growing = {name: a.select(rows) for name, a in self.growing.items()}
        twin.fixed = {name: a.index_select(0, rows) for name, a in self.fixed.items()}
        return twin

    def tensors(self) -> Iterable[Tensor]:
        """All that is held, free places included."""
        yield from (a.buffer for a in self.growing.values())
        yield from self.fixed.values()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(a.nbytes for a in self.growing.values()) + sum(a.nbytes for a in self.fixed.values())

    @property
    def free(self) -> int:
        """Bytes of places not in use."""
        return sum(a.free for a in self.growing.values())


def joined(x: Tensor) -> Tensor:
    """Heads [b, H, n, D] as one of all channels, [b, 1, n, H * D]."""
    return x.transpose(1, 2).flatten(2)[:, None]


def parted(x: Tensor, D: int) -> Tensor:
    """What `joined` joined: [b, 1, n, H * D] as [b, H, n, D]."""
    return x[:, 0].unflatten(-1, (-1, D)).transpose(1, 2)


def half(x: Tensor) -> Tensor:
    """float16 as it is held, large numbers at its ends."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half()
