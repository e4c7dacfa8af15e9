"""Codes of single numbers: the nearest of some levels, even or not, between the ends of a channel or a token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from methods.core.codes.bits import pack, size, unpack
from methods.core.codes.form import Arrays, Form, half


def even(bits: int) -> Tensor:
    """2 ** bits levels that lie evenly from -1 to 1."""
    return torch.linspace(-1, 1, 2**bits)


class Levels(Form):
    """Numbers as the nearest of 2 ** bits levels, as they are; the lower one at equal distance."""

    def __init__(self, levels: Tensor, read: Tensor | None = None):
        """levels [2 ** bits], ascending.  read: what the codes are read as; None: the levels."""
        self.levels, self.read = levels.float(), (levels if read is None else read).float()
        self.width = len(levels).bit_length() - 1
        assert len(levels) == len(self.read) == 2**self.width, "a code has whole bits"
        self.between = (self.levels[1:] + self.levels[:-1]) / 2

    @property
    def bits(self) -> float:
        return self.width

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return {"codes": pack(torch.bucketize(x.contiguous(), self.between.to(x.device)), self.width)}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return self.read.to(arrays["codes"].device)[unpack(arrays["codes"], self.width, D)]

    def nbytes(self, n: int, H: int, D: int) -> int:
        return n * H * size(D, self.width)

    def parameters(self) -> Iterable[Tensor]:
        return [self.levels] if self.read is self.levels else [self.levels, self.read]


class ChannelLevels(Levels):
    """Levels between the ends of each channel, which are the method's: nothing is held but codes."""

    def __init__(self, levels: Tensor, low: Tensor, high: Tensor, read: Tensor | None = None):
        """low, high [H, D]: where -1 and 1 of the levels lie; numbers beyond get the level at the end."""
        super().__init__(levels, read)
        self.middle, self.reach = (high + low).float() / 2, (high - low).float() / 2

    def normal(self, x: Tensor) -> Tensor:
        """x [b, H, n, D] between the ends of its channels, as -1 to 1."""
        middle, reach = self._ends(x)
        return torch.where(reach > 0, (x - middle) / reach, 0.0)

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return super().encode(self.normal(x))

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        x = super().decode(arrays, D)
        middle, reach = self._ends(x)
        return x * reach + middle

    def parameters(self) -> Iterable[Tensor]:
        return [*super().parameters(), self.middle, self.reach]

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle, reach = self.middle.to(x.device), self.reach.to(x.device)
        return middle[:, None], reach[:, None]


class TokenLevels(Levels):
    """Levels between the least and the greatest number of each token's vector, both ends in float16.

    Numbers that are `apart` are not among those two.
    """

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        low, high = (x, x) if apart is None else (x.masked_fill(apart, torch.inf), x.masked_fill(apart, -torch.inf))
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
        none = low > high  # all of them are apart
        middle, reach = half(((high + low) / 2).masked_fill(none, 0)), half(((high - low) / 2).masked_fill(none, 0))
        y = torch.where(reach > 0, (x - middle.float()) / reach.float(), 0.0)
        return {**super().encode(y), "middle": middle, "reach": reach}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return super().decode(arrays, D) * arrays["reach"].float() + arrays["middle"].float()

    def nbytes(self, n: int, H: int, D: int) -> int:
        return super().nbytes(n, H, D) + n * H * 4


class Means(Form):
    """A token's vector as its mean, in float16: no bits for a number by itself."""

    @property
    def bits(self) -> float:
        return 0.0

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        if apart is None:
            return {"mean": half(x.mean(-1, keepdim=True))}
        n = (~apart).sum(-1, keepdim=True).clamp_min(1)
        return {"mean": half(x.masked_fill(apart, 0.0).sum(-1, keepdim=True) / n)}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return arrays["mean"].float().expand(-1, -1, -1, D)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return n * H * 2


class TileLevels(Form):
    """Even steps from the least to the greatest number of each channel over every `tile` tokens; two float16 each."""

    def __init__(self, bits: int, tile: int):
        self.width, self.tile = bits, tile

    @property
    def bits(self) -> float:
        return self.width

    @property
    def drops(self) -> bool:
        return False

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        assert x.shape[2] % self.tile == 0, "tiles are whole"
        tiles = x.unflatten(2, (-1, self.tile))  # [b, H, tiles, tile, D]
        least, greatest = tiles.aminmax(dim=3)
        low = half(least)
        # by the end that is held, so that codes begin at it; a step that float16 does not hold would read as nothing
        step = half((greatest - low.float()).clamp_min(0) / (2**self.width - 1))
        apart_by = step.float()[:, :, :, None]
        codes = torch.where(apart_by > 0, (tiles - low.float()[:, :, :, None]) / apart_by, 0.0)
        codes = codes.round().clamp(0, 2**self.width - 1)
        return {"codes": pack(codes.flatten(2, 3).int(), self.width), "low": low, "step": step}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        codes = unpack(arrays["codes"], self.width, D).unflatten(2, (-1, self.tile)).float()
        return (codes * arrays["step"].float()[:, :, :, None] + arrays["low"].float()[:, :, :, None]).flatten(2, 3)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return H * (n * size(D, self.width) + n // self.tile * D * 4)
