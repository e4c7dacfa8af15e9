"""A few numbers of every token apart from the others, sparse: their places, and what their codes lack."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.codes.form import Arrays, Form, Wrapper, half
from methods.core.codes.levels import ChannelLevels


class Outliers(Wrapper):
    """The `each` least and the `each` greatest numbers of a token's vector, beside the codes of another form.

    Per number its channel, in one byte, or in two where there are more than 256, and in float16 what the code lacks.
    Beside levels between a channel's ends they are those farthest beyond, and what does not lie beyond lacks nothing.
    """

    def __init__(self, inner: Form, each: int):
        super().__init__(inner)
        self.each = each

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        assert apart is None and x.shape[-1] <= 1 << 15, "outliers are found once, and a place has 15 bits"
        ends = self.inner.normal(x) if isinstance(self.inner, ChannelLevels) else x
        order = ends.argsort(dim=-1, stable=True)
        places = torch.cat((order[..., : self.each], order[..., order.shape[-1] - self.each :]), -1).sort(-1).values
        arrays = self.inner.encode(x, torch.zeros_like(x, dtype=torch.bool).scatter(-1, places, True))
        lacks = (x - self.inner.decode(arrays, x.shape[-1])).gather(-1, places)
        if isinstance(self.inner, ChannelLevels):
            lacks = torch.where(ends.gather(-1, places).abs() > 1, lacks, 0.0)
        return {**arrays, "places": places.to(self._type(x.shape[-1])), "lacks": half(lacks)}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        x = self.inner.decode(arrays, D)
        return x.scatter_add(-1, arrays["places"].long(), arrays["lacks"].float())

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, H, D) + n * H * 2 * self.each * (2 + self._type(D).itemsize)

    def _type(self, D: int) -> torch.dtype:
        return torch.uint8 if D <= 256 else torch.int16
