"""Slots as low-bit codes, except the newest: what stores of quantized keys and values share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from methods.core.budget import share
from methods.core.decision import taken
from methods.core.stores.packed import GrowableBuffer, PackedTensor, RowGroup
from methods.core.stores.parts import PartedStore
from methods.core.stores.scheme import Scheme


class QuantizedStore(PartedStore):
    """Packs in groups, by a scheme for keys and one for values; later tokens as they leave the residual.

    Packed slots stay as they are: single ones cannot be dropped.
    """

    def __init__(
        self, schemes: Sequence[tuple[Scheme, Scheme]], budget: float | None = None, capacity: int | None = None
    ):
        """schemes: of keys and values, best first.  budget: of all that fit so large a share of the row's bytes in full
        precision (above 1: so many slots) the first is taken, else the smallest; None: always the first."""
        super().__init__(capacity)
        self.schemes, self.budget = schemes, budget
        self.layers: Sequence[Sequence[tuple[Scheme, Scheme]]] = [schemes]  # whose bytes the budget is for
        self.chosen: list[tuple[Scheme, Scheme]] = []  # for every row, once the prompt is whole

    def check(self, D: int) -> None:
        """Raises UserError when heads of this width cannot be packed."""
        for pair in self.schemes:
            for scheme in pair:
                if scheme.bits != 16:
                    scheme.width(D)

    def choose_with(self, layers: Sequence[Sequence[tuple[Scheme, Scheme]]], layer: int, budget: float | None) -> None:
        """Let all layers choose the same place of their lists, whose bytes together fit the budget.

        layers: the lists of all layers, best first and equally long.  layer: which of them is this store's.
        """
        self.layers, self.schemes, self.budget = layers, layers[layer], budget

    def choose(self, n: int, D: int, Dv: int, itemsize: int) -> tuple[Scheme, Scheme]:
        """Schemes of keys and values for a row with n slots of these widths and this many bytes per number."""
        if self.budget is None:
            return self.schemes[0]
        sizes = [
            sum(k.nbytes(n, D, itemsize) + v.nbytes(n, Dv, itemsize) for k, v in of_layers)
            for of_layers in zip(*self.layers, strict=True)
        ]
        allowed = share(self.budget, n) * n * (D + Dv) * itemsize * len(self.layers)
        best = next((i for i, size in enumerate(sizes) if size <= allowed), sizes.index(min(sizes)))
        return self.schemes[best]

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """As the base's; without a budget what the only scheme comes to."""
        if self.budget is not None:
            return [int(share(self.budget, n) * size) for n, size in zip(self._slots(), full, strict=True)]
        return [part.nbytes() // part.rows for part in self.parts for _ in range(part.rows)] or list(full)

    def nominal_bits(self) -> Sequence[float] | None:
        return [sum(scheme.bits for scheme in pair) / len(pair) for pair in self.chosen] or None

    def traits(self, row: int) -> dict[str, int]:
        return dict(zip(("key bits", "value bits"), (scheme.bits for scheme in self.chosen[row])))

    def packs(self, counts: Sequence[int]) -> bool:
        if not self.chosen:
            sizes = self.k.shape[-1], self.v.shape[-1], self.k.element_size()
            self.chosen = [self.choose(n, *sizes) for n in counts]
        return any(scheme.due(n) for n, pair in zip(counts, self.chosen) for scheme in pair)

    def part(self, row: int, k: Tensor, v: Tensor, pos: Tensor) -> RowGroup:
        n = pos.shape[-1]
        # a side that packs takes what it leaves over into memory of its own
        keys, values = (PackedTensor(x if s.due(n) else x.clone(), s) for x, s in zip((k, v), self.chosen[row]))
        return RowGroup(keys, values, GrowableBuffer(pos.clone()))

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.chosen = taken(self.chosen, rows)

    def _span(self) -> str:
        return f", a scale spans {self.schemes[0][0].group} elements"
