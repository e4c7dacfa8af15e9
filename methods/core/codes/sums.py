"""Codes that add up: a second form for what the first leaves, signs of a sketch, and sums of codes that are held."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from methods.core.codes.bits import pack, size, unpack
from methods.core.codes.form import Arrays, Form, Wrapper, half

SECOND = "second."


class Sum(Form):
    """Two codes, whose numbers add up: the second is of what the first leaves."""

    def __init__(self, first: Form, second: Form):
        self.first, self.second = first, second

    @property
    def bits(self) -> float:
        return self.first.bits + self.second.bits

    @property
    def drops(self) -> bool:
        return self.first.drops and self.second.drops

    @property
    def joins(self) -> bool:
        return self.first.joins and self.second.joins

    def grows(self, name: str) -> bool:
        return self.second.grows(name.removeprefix(SECOND)) if name.startswith(SECOND) else self.first.grows(name)

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        first = self.first.encode(x, apart)
        second = self.second.encode(x - self.first.decode(first, x.shape[-1]), apart)
        return {**first, **{SECOND + name: a for name, a in second.items()}}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        second = {name.removeprefix(SECOND): a for name, a in arrays.items() if name.startswith(SECOND)}
        return self.first.decode(arrays, D) + self.second.decode(second, D)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.first.nbytes(n, H, D) + self.second.nbytes(n, H, D)

    def parameters(self) -> Iterable[Tensor]:
        return [*self.first.parameters(), *self.second.parameters()]


class Sketch(Form):
    """The signs of a Gaussian matrix times a vector, and the vector's length in float16: 1 bit per row of the matrix.

    Products with what is read are right on average over matrices.
    """

    def __init__(self, matrix: Tensor):
        """matrix [m, D], of independent Gaussian numbers."""
        self.matrix = matrix.float()

    @property
    def bits(self) -> float:
        return len(self.matrix) / self.matrix.shape[1]

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        signs = x @ self.matrix.T.to(x.device) >= 0
        return {"signs": pack(signs.int(), 1), "length": half(x.norm(dim=-1, keepdim=True))}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        m = len(self.matrix)
        signs = unpack(arrays["signs"], 1, m).float() * 2 - 1
        return signs @ self.matrix.to(signs.device) * (math.sqrt(math.pi / 2) / m) * arrays["length"].float()

    def nbytes(self, n: int, H: int, D: int) -> int:
        return n * H * (size(len(self.matrix), 1) + 2)

    def parameters(self) -> Iterable[Tensor]:
        return [self.matrix]


class CodeSums(Wrapper):
    """The sums of a form's codes, held beside them, for products that are taken of codes alone.

    Of every `length` channels of a token, or of every channel over `length` tokens; a byte each where that holds them,
    else two.
    """

    def __init__(self, inner: Form, length: int, over_tokens: bool = False):
        """inner: holds `codes` of single numbers, of as many bits as it says."""
        super().__init__(inner)
        self.length, self.over_tokens = length, over_tokens
        assert length * (2 ** int(inner.bits) - 1) < 1 << 15, "a sum has 15 bits"

    @property
    def drops(self) -> bool:
        return self.inner.drops and not self.over_tokens

    def grows(self, name: str) -> bool:
        return name == "sums" or self.inner.grows(name)

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        arrays = self.inner.encode(x, apart)
        codes = unpack(arrays["codes"], int(self.inner.bits), x.shape[-1])
        dim = 2 if self.over_tokens else 3
        assert codes.shape[dim] % self.length == 0, "sums are of whole stretches"
        return {**arrays, "sums": codes.unflatten(dim, (-1, self.length)).sum(dim + 1).to(self._type())}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return self.inner.decode(arrays, D)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, H, D) + n * H * D // self.length * self._type().itemsize

    def _type(self) -> torch.dtype:
        return torch.uint8 if self.length * (2 ** int(self.inner.bits) - 1) <= 255 else torch.int16
