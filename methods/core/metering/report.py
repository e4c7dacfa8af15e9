"""The ledger of one row of a batch, or of several together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from methods.core.errors import BudgetMiss


@dataclass
class Report:
    """The ledger of one row of a batch, or of several together. All sizes in bytes.

    full: keys and values of the full cache for the row's own tokens, at the model's dtype and KV heads, sliding layers
    at their window; full_prompt: the same at the end of the prompt.  held_prompt, held_end: what the row's own slots
    hold at the end of the prompt and of its generation, whatever the other rows are.  mean_decode: held, mean over the
    passes after the prompt, 0 without any.  padding, padding_end: what the batch's storage holds at these moments in
    places that are no row's slot, free ones for tokens to come among them; a row has an equal part.
    peak_prompt, peak_decode: largest total of the phase, layer by layer, padding and workspace included; a row has an
    equal part.  read_step: keys, values, codes and what selects among them that a decode step was handed, the mean over
    steps; without one the mean over turns, or over their tokens where each reads for itself, and before the first pass
    what is held.  full_read: the same of
    the full cache at these steps, 0 before the first.  read_turn: by all passes of turns together.  moved_step,
    moved_turn: the same of what crossed between host and device.  workspace: most that the cache held at one moment
    only for scoring, without padding.  adapter: the method's own parameters, the same for any batch.  host: of what is
    held, on the host.  binds: what the budget is for, "held" or "read".  asked: allowed by the budget, held or read by
    a step.  overhead: documented on top of what is held.  per_layer: held_prompt per layer.  nominal_bits,
    effective_bits: of a number at the end of the prompt, where numbers are coded: of its code alone, and of all that is
    held.
    """

    n_layers: int
    full: int = 0
    full_prompt: int = 0
    held_prompt: int = 0
    held_end: int = 0
    padding: int = 0
    padding_end: int = 0
    peak_prompt: int = 0
    peak_decode: int = 0
    mean_decode: int = 0
    read_step: int = 0
    full_read: int = 0
    read_turn: int = 0
    moved_step: int = 0
    moved_turn: int = 0
    workspace: int = 0
    adapter: int = 0
    host: int = 0
    asked: int = 0
    overhead: int = 0
    per_layer: list[int] = field(default_factory=list)
    nominal_bits: float | None = None
    effective_bits: float | None = None
    binds: str = "held"

    @property
    def share(self) -> float:
        """held_prompt over full_prompt: what the method really left of the prompt's cache."""
        return self.held_prompt / self.full_prompt if self.full_prompt else 0.0

    @property
    def read_share(self) -> float:
        """read_step over full_read: what the method really read of what the full cache would have."""
        return self.read_step / self.full_read if self.full_read else 0.0

    def check_budget(self, method: str) -> None:
        """Raises BudgetMiss when more was held at the prompt's end, or read by a step, than the budget allows."""
        if self.binds == "read":
            if self.full_read and self.read_step > self.asked:
                raise BudgetMiss(method, self.asked, self.read_step, self.full_read, self.binds)
            return
        if self.held_prompt > self.asked + self.overhead:
            raise BudgetMiss(method, self.asked + self.overhead, self.held_prompt, self.full_prompt)

    def per(self, rows: int) -> Report:
        """The mean over so many rows that the report is of; the method's own parameters belong to each."""
        whole = ("n_layers", "adapter", "nominal_bits", "effective_bits", "binds")
        sizes = {name: value for name, value in vars(self).items() if name not in whole}
        means: dict[str, Any] = {
            name: [round(n / rows) for n in value] if isinstance(value, list) else round(value / rows)
            for name, value in sizes.items()
        }
        return dataclasses.replace(self, **means)

    def __str__(self) -> str:
        """The ledger as a table: what is held, read and spent, and its share of the full cache at that moment."""
        lines = [
            ("held, end of the prompt", self.held_prompt, self.full_prompt),
            ("held, now", self.held_end, self.full),
            ("full cache, end of the prompt", self.full_prompt, self.full_prompt),
            ("full cache, now", self.full, self.full),
            ("asked for", self.asked, self.full_prompt if self.binds == "held" else self.full_read),
            ("overhead documented on top", self.overhead, self.full_prompt),
            ("padding and free places, now", self.padding_end, self.full),
            ("peak, reading the prompt", self.peak_prompt, self.full_prompt),
            ("peak, after it", self.peak_decode, self.full),
            ("read by a step, mean", self.read_step, self.full_read or self.full),
            ("read by turns", self.read_turn, self.full),
            ("moved by a step, mean", self.moved_step, self.full_read),
            ("workspace", self.workspace, self.full_prompt),
            ("the method's own parameters", self.adapter, self.full),
            ("on the host", self.host, self.full),
        ]
        rows = [(what, f"{n:,}", f"{n / of:.1%}" if of else "-") for what, n, of in lines]
        if self.nominal_bits is not None and self.effective_bits is not None:
            rows.append(("bits per number, as codes", f"{self.nominal_bits:.2f}", "-"))
            rows.append(("bits per number, in all", f"{self.effective_bits:.2f}", "-"))
        head = ("", "bytes", "of full")
        first, second, third = (max(len(row[i]) for row in [head, *rows]) for i in range(3))
        return "\n".join(f"{a:<{first}}  {b:>{second}}  {c:>{third}}" for a, b, c in [head, *rows])

    def to_dict(self) -> dict[str, Any]:
        """All fields and the share, as plain values."""
        return {**dataclasses.asdict(self), "share": self.share}
