"""Numbers turned, or brought to one size, before they are packed: channels then follow one distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from methods.core.codes.form import Arrays, Form, Wrapper, half, joined, parted
from methods.core.errors import UserError


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix over sqrt(size): orthonormal and symmetric. Raises UserError where size is no power of two."""
    if size < 1 or size & (size - 1):
        raise UserError(f"a Hadamard rotation needs a width that is a power of two, and this one is {size}")
    x = torch.ones(1, 1, dtype=torch.float64)
    while len(x) < size:
        x = torch.cat((torch.cat((x, x), 1), torch.cat((x, -x), 1)))
    return (x / math.sqrt(size)).float()


def random_rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix drawn evenly: QR of Gaussian numbers, signs by the diagonal of R."""
    g = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


class Rotated(Wrapper):
    """Blocks of channels turned by an orthogonal matrix, and turned back when they are read."""

    def __init__(self, inner: Form, matrix: Tensor):
        """matrix [g, g]: y = matrix x of every g channels that follow each other."""
        super().__init__(inner)
        self.matrix = matrix.float()

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner.encode(self._turned(x, self.matrix.T))

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return self._turned(self.inner.decode(arrays, D), self.matrix)

    def parameters(self) -> Iterable[Tensor]:
        return [*self.inner.parameters(), self.matrix]

    def _turned(self, x: Tensor, by: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(by))) @ by.to(x.device)).flatten(-2)


class Normed(Wrapper):
    """Blocks of channels without their length, so that their numbers have variance 1; the length is held in float16."""

    def __init__(self, inner: Form, size: int):
        """size: channels of a block."""
        super().__init__(inner)
        self.size = size

    def grows(self, name: str) -> bool:
        return name == "length" or self.inner.grows(name)

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        blocks = x.unflatten(-1, (-1, self.size))
        length = half(blocks.norm(dim=-1))
        # by the exact length: what is coded is a direction
        scale = blocks.norm(dim=-1, keepdim=True) / math.sqrt(self.size)
        inner = self.inner.encode(torch.where(scale > 0, blocks / scale, 0.0).flatten(-2))
        return {**inner, "length": length}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        x = self.inner.decode(arrays, D).unflatten(-1, (-1, self.size))
        return (x * (arrays["length"].float() / math.sqrt(self.size))[..., None]).flatten(-2)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, H, D) + n * H * (D // self.size) * 2


class HeadsTogether(Wrapper):
    """All heads of a token as one vector of all channels."""

    def __init__(self, inner: Form, heads: int):
        super().__init__(inner)
        self.heads = heads

    @property
    def drops(self) -> bool:
        return False

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner.encode(joined(x), None if apart is None else joined(apart))

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return parted(self.inner.decode(arrays, self.heads * D), D)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, 1, H * D)
