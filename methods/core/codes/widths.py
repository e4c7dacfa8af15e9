"""Bits per token: every token's vector in the form of its class, and the classes themselves in a few bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from methods.core.codes.bits import pack, size, unpack
from methods.core.codes.form import Arrays, Coded, Form


class Widths:
    """Forms to choose from, of which each token and head takes one."""

    def __init__(self, forms: Sequence[Form]):
        """forms: each of single tokens' vectors, such as TokenLevels."""
        assert all(form.drops for form in forms), "a token's code is its own"
        self.forms = list(forms)
        self.class_bits = max(1, math.ceil(math.log2(len(forms))))

    def pack(self, x: Tensor, classes: Tensor) -> Coded:
        """x [1, H, n, D] of one row, whose tokens are of the classes [1, H, n]; waits for the device.

        Rows hold different numbers of a class, so that each is packed by itself: by a store whose `rows_apart` says so.
        """
        assert len(x) == 1, "rows hold different numbers of a class"
        counts = [int(n) for n in torch.bincount(classes.flatten(), minlength=len(self.forms)).tolist()]
        arrays = {"classes": pack(classes, self.class_bits)[:, :, None]}
        for i, form in enumerate(self.forms):
            if counts[i]:
                of_class = form.encode(x[classes == i][None, None].float())  # [1, 1, tokens, D]
                arrays |= {f"{i}.{name}": a for name, a in of_class.items()}
        return Coded(_OfClasses(self, counts, x.shape[2]), x, arrays)


class _OfClasses(Form):
    """Tokens of one row, by class one behind the other; nothing is put behind them, and none goes."""

    def __init__(self, widths: Widths, counts: Sequence[int], n: int):
        """counts: tokens of each class, over all heads.  n: tokens of a head."""
        self.widths, self.counts, self.n = widths, counts, n

    @property
    def bits(self) -> float:
        return sum(n * form.bits for n, form in zip(self.counts, self.widths.forms)) / max(1, sum(self.counts))

    @property
    def drops(self) -> bool:
        return False

    @property
    def joins(self) -> bool:
        return False

    def grows(self, name: str) -> bool:
        return False

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        classes = unpack(arrays["classes"][:, :, 0], self.widths.class_bits, self.n)  # [1, H, n]
        x = torch.empty(*classes.shape, D, device=classes.device)
        for i, form in enumerate(self.widths.forms):
            if self.counts[i]:
                mine = {name.removeprefix(f"{i}."): a for name, a in arrays.items() if name.startswith(f"{i}.")}
                x[classes == i] = form.decode(mine, D)[0, 0]
        return x

    def nbytes(self, n: int, H: int, D: int) -> int:
        held = sum(form.nbytes(m, 1, D) for m, form in zip(self.counts, self.widths.forms))
        return held + H * size(n, self.widths.class_bits)

    def parameters(self) -> Iterable[Tensor]:
        return [x for form in self.widths.forms for x in form.parameters()]
