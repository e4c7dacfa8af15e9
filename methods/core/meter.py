"""Counts bytes held and bytes read, the same way for every method: by storage, each once, and by row of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from methods.core.contract import Holding, LayerCache, Stage, Step
from methods.core.decision import taken
from methods.core.errors import BudgetMiss


def nbytes(tensors: Iterable[Tensor], billed: set[int] | None = None) -> int:
    """Bytes of the storages behind the tensors, each storage once: a small view counts what it keeps alive.

    billed: storages that somebody else pays for; those that are counted here come to them.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    if billed is None:
        return sum(storages.values())
    new = storages.keys() - billed
    billed |= new
    return sum(storages[one] for one in new)


@dataclass
class Report:
    """The ledger of one row of a batch, or of several together. All sizes in bytes.

    full: keys and values of the full cache for the row's own tokens, at the model's dtype and KV heads, sliding layers
    at their window; full_prompt: the same at the end of the prompt.  held_prompt, held_end: what the row's own slots
    hold at the end of the prompt and of its generation, whatever the other rows are.  mean_decode: held, mean over the
    passes after the prompt, 0 without any.  padding, padding_end: what the batch's storage holds at these moments in
    places that are no row's slot, free ones for tokens to come among them; a row has an equal part.
    peak_prompt, peak_decode: largest total of the phase, layer by layer, padding and workspace included; a row has an
    equal part.  read_step: read by the last decode step.  workspace: most that the cache held at one moment only for
    scoring.  adapter: the method's own parameters, the same for any batch.  host: of what is held, on the host while
    the model is on a device.  asked: allowed by the budget.  overhead: documented on top.  per_layer: held_prompt per
    layer.  nominal_bits, effective_bits: of a number at the end of the prompt, where numbers are coded: of its code
    alone, and of all that is held.
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

    def per(self, rows: int) -> Report:
        """The mean over so many rows that the report is of; the method's own parameters belong to each."""
        whole = ("n_layers", "adapter", "nominal_bits", "effective_bits")
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
            ("asked for", self.asked, self.full_prompt),
            ("overhead documented on top", self.overhead, self.full_prompt),
            ("padding and free places, now", self.padding_end, self.full),
            ("peak, reading the prompt", self.peak_prompt, self.full_prompt),
            ("peak, after it", self.peak_decode, self.full),
            ("read by the last step", self.read_step, self.full),
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


@dataclass
class Moment:
    """What own slots of every row hold when a pass is done, and their tokens so far."""

    held: list[int]
    tokens: list[int]

    def choose(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self.held, self.tokens = ([numbers[row] for row in rows] for numbers in (self.held, self.tokens))


@dataclass
class PromptEnd(Moment):
    """The moment that a prompt ends.

    padding: what no row's slot holds.  per_layer: held, by layer and row.  asked, overhead: by row.  bits: nominal
    ones, by row, where numbers are coded.
    """

    padding: int
    per_layer: list[list[int]]
    asked: list[int]
    overhead: list[int]
    bits: list[float]
    itemsize: int

    def choose(self, rows: Sequence[int]) -> None:
        super().choose(rows)
        self.per_layer = [[of_layer[row] for row in rows] for of_layer in self.per_layer]
        self.asked, self.overhead = ([numbers[row] for row in rows] for numbers in (self.asked, self.overhead))
        self.bits = [self.bits[row] for row in rows] if self.bits else []


class Meter:
    """Watches the layers of one cache through a sequence."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = layers
        self.peak_prompt = self.peak_decode = self.workspace = 0
        self.prompt: PromptEnd | None = None
        self.passes: list[Moment] = []  # those after the prompt
        self.tokens: list[int] = []  # of every row, padding left out
        self._slots: dict[int, tuple[int, int | None]] = {}  # per layer: bytes of one full-cache slot, sliding window
        self._device, self._itemsize = "cpu", 4  # of the model's keys

    def after_append(self, step: Step) -> None:
        """The fullest moment of a layer's turn."""
        if step.layer == 0:
            self._count(step)
        last = step.layer == len(self.layers) - 1
        if step.stage is Stage.DECODE and not last:
            return
        self.look(step)

    def before_end_pass(self, step: Step) -> None:
        """All layers have had their turn, and what they left for the end of the pass is still there."""
        if any(layer.scratch for layer in self.layers):
            self.look(step)

    def after_end_step(self, step: Step) -> None:
        """The end of a layer's turn."""
        last = step.layer == len(self.layers) - 1
        if step.stage is not Stage.DECODE or last:
            self._scoring()
        if step.stage is Stage.ENDS_PROMPT:
            slot = step.k.shape[1] * (step.k.shape[3] + step.v.shape[3]) * step.k.element_size()
            self._slots[step.layer] = (slot, step.rules.window)
            self._device = step.k.device.type
            self._itemsize = step.k.element_size()
            if last:
                self.end_prompt()
        elif step.stage is not Stage.MID_PROMPT and last:
            self.passes.append(Moment(self._held(), list(self.tokens)))

    def end_prompt(self) -> None:
        """The prompt has ended, and what is held now is what was left of it."""
        self.prompt, self.passes = self._prompt_end(), []

    def report(self, rows: Sequence[int] | None = None, behind: Sequence[int] | None = None) -> Report:
        """The ledger of some rows together; None: of all, and as it is now.

        behind: for every row of the batch how many passes it was fed after its own last one. They do not count.
        """
        B = len(self.tokens)
        prompt, (now, padding) = self.prompt, self._now()
        chosen = range(B) if rows is None else rows
        ends = [self._end(0 if behind is None else behind[row], now) for row in chosen]
        means = [self._mean(row, 0 if behind is None else behind[row]) for row in chosen]
        report = Report(
            n_layers=len(self.layers),
            full=sum(sum(self._full(end.tokens[row])) for row, end in zip(chosen, ends)),
            held_end=sum(end.held[row] for row, end in zip(chosen, ends)),
            padding_end=_part(padding, chosen, B),
            peak_prompt=_part(self.peak_prompt, chosen, B),
            peak_decode=_part(self.peak_decode, chosen, B),
            mean_decode=sum(means),
            workspace=_part(self.workspace, chosen, B),
            adapter=nbytes(t for x in self.layers for t in x.adapters()),
        )
        total = self._total()
        read = nbytes(t for x in self.layers for t in x.read_tensors())
        report.read_step = report.held_end * read // total if total else 0
        if self._device != "cpu":
            on_host = nbytes(t for x in self.layers for t in x.tensors() if t.device.type == "cpu")
            report.host = _part(on_host, chosen, B)
        if prompt is None:
            return report
        report.full_prompt = sum(sum(self._full(prompt.tokens[row])) for row in chosen)
        report.held_prompt = sum(prompt.held[row] for row in chosen)
        report.padding = _part(prompt.padding, chosen, B)
        report.per_layer = [sum(held[row] for row in chosen) for held in prompt.per_layer]
        report.asked = sum(prompt.asked[row] for row in chosen)
        report.overhead = sum(prompt.overhead[row] for row in chosen)
        if prompt.bits:
            report.nominal_bits = sum(prompt.bits[row] for row in chosen) / len(chosen)
            report.effective_bits = 8 * prompt.itemsize * report.share
        return report

    def reports(self, behind: Sequence[int] | None = None) -> list[Report]:
        """The ledger of every row."""
        return [self.report([row], behind) for row in range(len(self.tokens))]

    def check_budget(self, method: str) -> None:
        """Raises BudgetMiss when a row held more at the prompt's end than asked for and documented."""
        for report in self.reports():
            report.check_budget(method)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i], and has its history."""
        if not self.tokens:
            return
        before, self.tokens = len(self.tokens), taken(self.tokens, rows)
        alike = len(rows) == before and all(len(set(one.held)) == 1 for one in self._moments())
        if alike and len(set(self.tokens)) == 1:  # then no device is waited for
            return
        order = rows.tolist()
        for one in self._moments():
            one.choose(order)

    def _moments(self) -> list[Moment]:
        return [*([] if self.prompt is None else [self.prompt]), *self.passes]

    def _count(self, step: Step) -> None:
        """The tokens of a pass."""
        B, T = step.pos.shape
        new = [T] * B
        if step.padded and step.stage is not Stage.DECODE:
            new = (step.pos >= 0).sum(-1).tolist()
        self.tokens = [n + m for n, m in zip(self.tokens or [0] * B, new, strict=True)]

    def _prompt_end(self) -> PromptEnd:
        layers, B = self._by_layer(), len(self.tokens)
        # the fullest row of a batch is padded by nothing: what all rows have is a place that ought to be free memory
        least = [min((n - m for n, m in zip(x.padding, x.alike or [0] * B)), default=0) for x in layers]
        surplus = self._total() - sum(sum(x.held) + sum(x.padding) for x in layers)
        more = [_part(max(0, surplus), [row], B) for row in range(B)]
        per_layer = [[n + extra for n in x.held] for x, extra in zip(layers, least)]
        held = [sum(row) + extra for row, extra in zip(zip(*per_layer), more)]
        full = [self._full(n) for n in self.tokens]  # by row and layer
        asked = [x.budget_bytes(sizes) for x, sizes in zip(self.layers, zip(*full))]
        bits = [of_layer for x in self.layers if (of_layer := x.nominal_bits()) is not None]
        return PromptEnd(
            held,
            list(self.tokens),
            padding=sum(sum(x.padding) - B * extra for x, extra in zip(layers, least)),
            per_layer=per_layer,
            asked=[sum(row) for row in zip(*asked)],
            overhead=[sum(row) for row in zip(*(x.beside for x in layers))],
            bits=[sum(row) / len(row) for row in zip(*bits)],
            itemsize=self._itemsize,
        )

    def _now(self) -> tuple[Moment, int]:
        """What is held now, and by no row's slot; the rows pay for what no layer accounts for."""
        layers, B = self._by_layer(), len(self.tokens)
        held = [sum(row) for row in zip(*(x.held for x in layers))]
        padding = sum(sum(x.padding) for x in layers)
        surplus = max(0, self._total() - sum(held) - padding)
        return Moment([n + _part(surplus, [row], B) for row, n in enumerate(held)], list(self.tokens)), padding

    def _held(self) -> list[int]:
        """What own slots of every row hold."""
        billed: set[int] = set()
        return [sum(row) for row in zip(*(x.held_bytes() or self._evenly(x, billed).held for x in self.layers))]

    def _by_layer(self) -> list[Holding]:
        billed: set[int] = set()
        return [x.holding() or self._evenly(x, billed) for x in self.layers]

    def _evenly(self, layer: LayerCache, billed: set[int]) -> Holding:
        """What a layer holds that does not say whose it is, and that no layer below it has been billed for."""
        B, size = len(self.tokens), nbytes(layer.tensors(), billed)
        held, beside = ([_part(n, [row], B) for row in range(B)] for n in (size, layer.overhead()))
        return Holding(held, beside, [0] * B)

    def _end(self, behind: int, now: Moment) -> Moment:
        """When a row had its last pass."""
        if behind == 0 or self.prompt is None:
            return now
        return self.passes[-1 - behind] if behind < len(self.passes) else self.prompt

    def _mean(self, row: int, behind: int) -> int:
        held = [moment.held[row] for moment in self.passes[: len(self.passes) - behind]]
        return sum(held) // len(held) if held else 0

    def look(self, step: Step) -> None:
        """What is held now, scoring included, may be the phase's largest."""
        here = self._total() + self._scoring()
        if step.stage in (Stage.DECODE, Stage.TURN):
            self.peak_decode = max(self.peak_decode, here)
        else:
            self.peak_prompt = max(self.peak_prompt, here)

    def _scoring(self) -> int:
        """Bytes held only for scoring, of all layers at this moment."""
        now = nbytes(t for x in self.layers for t in (*x.workspace(), *x.scratch.values()))
        self.workspace = max(self.workspace, now)
        return now

    def _total(self) -> int:
        return nbytes(t for x in self.layers for t in x.tensors())

    def _full(self, tokens: int) -> list[int]:
        """What a full cache of so many tokens holds, per layer; a sliding layer holds what its next query can see."""
        return [
            slot * (tokens if window is None else min(tokens, window - 1))
            for slot, window in (self._slots[i] for i in sorted(self._slots))
        ]


def _part(total: int, rows: Sequence[int], of: int) -> int:
    """What some rows have of bytes that are shared out evenly among so many; the first ones have the remainder."""
    return sum(total // of + (row < total % of) for row in rows) if of else 0
