"""Counts bytes held and bytes read, the same way for every method: by storage, each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from methods.core.contract import LayerCache, Stage, Step
from methods.core.errors import BudgetMiss


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each storage once: a small view counts what it keeps alive."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


@dataclass
class Report:
    """The ledger of one batch. All sizes in bytes, for all rows together.

    full: keys and values of the full cache for the tokens seen, at the model's dtype and KV heads, sliding layers at
    their window; full_prompt: the same at the end of the prompt.  held_prompt, held_end: held at the end of the prompt
    and now.  mean_decode: held, mean over the passes after the prompt, 0 without any.
    peak_prompt, peak_decode: largest held total of the phase, layer by layer.  read_step: read by the last
    decode step.  workspace: largest held only for scoring.  adapter: the method's own parameters.  host: of all these,
    on the host while the model is on a device.  asked: allowed by the budget.  overhead: documented on top.
    per_layer: held_prompt per layer.  nominal_bits, effective_bits: of a number at the end of the prompt, where numbers
    are coded: of its code alone, and of all that is held.
    """

    n_layers: int
    full: int = 0
    full_prompt: int = 0
    held_prompt: int = 0
    held_end: int = 0
    peak_prompt: int = 0
    peak_decode: int = 0
    mean_decode: int = 0
    read_step: int = 0
    workspace: int = 0
    adapter: int = 0
    host: int = 0
    asked: int = 0
    overhead: int = 0
    per_layer: list[int] = field(default_factory=list)
    nominal_bits: float | None = None
    effective_bits: float | None = None

    @property
    def share(self) -> float:
        """held_prompt over full_prompt: what the method really left of the prompt's cache."""
        return self.held_prompt / self.full_prompt if self.full_prompt else 0.0

    def check_budget(self, method: str) -> None:
        """Raises BudgetMiss when more was held at the prompt's end than asked for and documented."""
        if self.held_prompt > self.asked + self.overhead:
            raise BudgetMiss(method, self.asked + self.overhead, self.held_prompt, self.full_prompt)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the share, as plain values."""
        return {**dataclasses.asdict(self), "share": self.share}


class Meter:
    """Watches the layers of one cache through a sequence."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = layers
        self.books = Report(n_layers=len(layers))
        self._columns = [0] * len(layers)  # tokens seen per row, padding included
        self._slots: dict[int, tuple[int, int | None]] = {}  # per layer: bytes of one full-cache slot, sliding window
        self._device = "cpu"
        self._after_prompt = (0, 0)  # passes, and the sum of what each held

    def after_take(self, step: Step) -> None:
        """The fullest moment of a layer's turn."""
        B, H, T, D = step.k.shape
        self._columns[step.layer] += T
        if step.stage is Stage.DECODE:
            if step.layer == len(self.layers) - 1:
                held = self._held()
                self.books.peak_decode = max(self.books.peak_decode, held)
                self._add(held)
            return
        books = self.books
        held = self._held()
        if step.stage is Stage.TURN:
            books.peak_decode = max(books.peak_decode, held)
            if step.layer == len(self.layers) - 1:
                self._add(held)
            return
        books.peak_prompt = max(books.peak_prompt, held)
        if step.stage is Stage.ENDS_PROMPT:
            slot = B * H * (D + step.v.shape[3]) * step.k.element_size()
            self._slots[step.layer] = (slot, step.rules.window)
            self._device = step.k.device.type

    def after_settle(self, step: Step) -> None:
        """The end of a layer's turn."""
        books, layer = self.books, self.layers[step.layer]
        books.workspace = max(books.workspace, nbytes(layer.workspace()))
        if step.stage is not Stage.ENDS_PROMPT or step.layer != len(self.layers) - 1:
            return
        books.full_prompt = sum(self._full())
        books.per_layer = [nbytes(x.tensors()) for x in self.layers]
        books.held_prompt = self._held()
        books.overhead = sum(x.overhead() for x in self.layers)
        bits = [b for x in self.layers if (b := x.nominal_bits()) is not None]
        if bits:
            books.nominal_bits = sum(bits) / len(bits)
            books.effective_bits = 8 * step.k.element_size() * books.share
        books.asked = sum(x.asked(full) for x, full in zip(self.layers, self._full(), strict=True))

    def report(self) -> Report:
        """The ledger now."""
        books = dataclasses.replace(self.books, per_layer=list(self.books.per_layer))
        books.full = sum(self._full())
        books.held_end = self._held()
        passes, total = self._after_prompt
        books.mean_decode = total // passes if passes else 0
        books.read_step = nbytes(t for x in self.layers for t in x.touched())
        books.adapter = nbytes(t for x in self.layers for t in x.adapters())
        if self._device != "cpu":
            books.host = nbytes(t for x in self.layers for t in x.tensors() if t.device.type == "cpu")
        return books

    def _add(self, held: int) -> None:
        passes, total = self._after_prompt
        self._after_prompt = (passes + 1, total + held)

    def _held(self) -> int:
        return nbytes(t for x in self.layers for t in x.tensors())

    def _full(self) -> list[int]:
        """What a full cache would hold now, per layer; a sliding layer holds what its next query can see."""
        return [
            slot * (n if window is None else min(n, window - 1))
            for n, (slot, window) in ((self._columns[i], self._slots[i]) for i in sorted(self._slots))
        ]
