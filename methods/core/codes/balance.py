"""Tiles of tokens brought to an even spread before they are packed.

Both scales of a tile are found in turns, as in KVarN (arXiv:2606.03458): those of tokens and channels whose largest
and least standard deviations lie nearest to each other. One of them is held; the range of the codes has the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.codes.form import Arrays, Form, Wrapper, half

LEAST, MOST = 1e-3, 1e3  # of a standard deviation
LEAST_LOG, MOST_LOG = -0.3, 10.0  # of a scale's logarithm: what is quiet is not blown up


def balanced(x: Tensor, iterations: int) -> Tensor:
    """The scales [..., 1, C] of the columns of x [..., R, C] that leave its rows and columns most alike, float32."""
    columns, rows = x.new_zeros(*x.shape[:-2], 1, x.shape[-1]), x.new_zeros(*x.shape[:-1], 1)
    best, least = columns.exp(), _imbalance(x)
    for _ in range(iterations):
        columns = _grown(columns, x / columns.exp() / rows.exp(), -2)
        rows = _grown(rows, x / columns.exp() / rows.exp(), -1)
        now = _imbalance(x / columns.exp() / rows.exp())
        better = now <= least
        best, least = torch.where(better, columns.exp(), best), torch.where(better, now, least)
    return best


def _grown(log: Tensor, x: Tensor, dim: int) -> Tensor:
    return (log + x.std(dim, keepdim=True).clamp(LEAST, MOST).log()).clamp(LEAST_LOG, MOST_LOG)


def _imbalance(x: Tensor) -> Tensor:
    """Of rows and of columns the largest standard deviation over the least, added up, [..., 1, 1]."""
    of_columns, of_rows = x.std(-2, keepdim=True), x.std(-1, keepdim=True)
    return sum(
        s.amax((-2, -1), keepdim=True) / s.amin((-2, -1), keepdim=True).clamp_min(1e-8) for s in (of_columns, of_rows)
    )


class Balanced(Wrapper):
    """Tiles of `tile` tokens, divided by a scale per token, or per channel, in float16."""

    def __init__(self, inner: Form, tile: int, of: str, iterations: int = 8):
        """of: "tokens" or "channels", which have the scales.

        inner: TileLevels of the same tiles beside scales of tokens, TokenLevels beside those of channels.
        """
        super().__init__(inner)
        self.tile, self.of, self.iterations = tile, of, iterations

    @property
    def drops(self) -> bool:
        return False

    def grows(self, name: str) -> bool:
        return name == "spread" or self.inner.grows(name)

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        assert x.shape[2] % self.tile == 0, "tiles are whole"
        tiles = x.unflatten(2, (-1, self.tile))  # [b, H, tiles, tile, D]
        if self.of == "tokens":
            spread = balanced(tiles.transpose(-1, -2), self.iterations).transpose(-1, -2).flatten(2, 3)
        else:
            spread = balanced(tiles, self.iterations)[:, :, :, 0]
        return {**self.inner.encode(x / self._wide(spread)), "spread": half(spread)}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        return self.inner.decode(arrays, D) * self._wide(arrays["spread"].float())

    def nbytes(self, n: int, H: int, D: int) -> int:
        return self.inner.nbytes(n, H, D) + H * 2 * (n if self.of == "tokens" else n // self.tile * D)

    def _wide(self, spread: Tensor) -> Tensor:
        """One scale per token, [b, H, n, 1], or per token and channel."""
        return spread if self.of == "tokens" else spread.repeat_interleave(self.tile, 2)
