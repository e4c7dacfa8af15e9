"""What a form of code is, and how codes are held: in arrays that grow with the tokens, or stand for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kernels import reads
from methods.core.stores.packed import GrowableBuffer

Arrays = Mapping[str, Tensor]


class Form:
    """Numbers [b, H, n, D] as packed bytes and back. Unchanged while running: what it learned came with it.

    Arrays are [b, H or 1, n, width], a token or a whole group of them on dimension 2, unless they do not grow.
    """

    @property
    def bits(self) -> float:
        """Nominal bits of a number: its code alone, without scales, outliers and the like."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether a token's code depends on the token alone, so that single ones may go."""
        return True

    @property
    def joins(self) -> bool:
        """Whether codes of later tokens may be put behind."""
        return True

    def grows(self, name: str) -> bool:
        """Whether an array has places along the tokens; else it stands for all that were packed together."""
        return True

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        """Arrays of x [b, H, n, D], float32.

        apart [b, H, n, D]: numbers that are held elsewhere too, whatever their code, which no range need cover.
        """
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


class Wrapper(Form):
    """A form that changes numbers before another form packs them."""

    def __init__(self, inner: Form):
        self.inner = inner

    @property
    def bits(self) -> float:
        return self.inner.bits

    @property
    def drops(self) -> bool:
        return self.inner.drops

    @property
    def joins(self) -> bool:
        return self.inner.joins

    def grows(self, name: str) -> bool:
        return self.inner.grows(name)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, H, D)

    def parameters(self) -> Iterable[Tensor]:
        return self.inner.parameters()


class Coded:
    """Codes of some tokens of all rows of a part."""

    def __init__(self, form: Form, x: Tensor, arrays: Arrays | None = None):
        """x [b, H, n, D]: what is to be packed.  arrays: what it was packed into; None: it will be."""
        arrays = form.encode(x.float()) if arrays is None else arrays
        self.form, self.heads, self.D, self.n, self.dtype = form, x.shape[1], x.shape[-1], x.shape[2], x.dtype
        self.growing = {name: GrowableBuffer(a) for name, a in arrays.items() if form.grows(name)}
        self.fixed = {name: a for name, a in arrays.items() if not form.grows(name)}

    def read(self) -> Tensor:
        """The numbers, [b, H, n, D], in the type that they came in."""
        arrays = self.arrays
        numbers = self.form.decode(arrays, self.D).to(self.dtype)
        reads.instead(numbers, *arrays.values())
        return numbers

    def join(self, later: Coded, to_come: int | None) -> bool:
        """Put later tokens behind, where the form allows it; to_come: tokens that will still be packed."""
        if later.form is not self.form or not self.form.joins:
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
        if not self.form.drops:
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
    def arrays(self) -> dict[str, Tensor]:
        """What the form made, without free places: for an attention that takes codes as they are."""
        return {**{name: a.used for name, a in self.growing.items()}, **self.fixed}

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
