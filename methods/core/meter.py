"""Counts bytes held and bytes read, the same way for every method: by storage, each once, and by row of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from methods.core.contract import Holding, LayerCache, Stage, Step
from methods.core.decision import taken
from methods.core.metering.moments import Moment, PromptEnd, nbytes, own_bytes, part
from methods.core.metering.reading import Reading
from methods.core.metering.report import Report

__all__ = ["Meter", "Report", "nbytes"]


class Meter:
    """Watches the layers of one cache through a sequence."""

    def __init__(self, layers: Sequence[LayerCache], binds: str = "held"):
        """binds: what the method's budget is for, see `Method.binds`."""
        self.layers, self.binds = layers, binds
        self.peak_prompt = self.peak_decode = 0
        self.workspace: list[int] = []  # of every row
        self.prompt: PromptEnd | None = None
        self.passes: list[Moment] = []  # those after the prompt
        self.reads = Reading()  # of the same passes
        self.tokens: list[int] = []  # of every row, padding left out
        self.columns = 0  # of the batch, padding included
        self._slots: dict[int, tuple[int, int | None]] = {}  # per layer: bytes of one full-cache slot, sliding window
        self._device, self._itemsize = "cpu", 4  # of the model's keys

    def reading(self, step: Step) -> AbstractContextManager[None]:
        """Inside the block the cache works for this step: what ops are handed there is read."""
        return self.reads.during(step)

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
        self.reads.end_turn(step, self.layers[step.layer])
        if step.stage in (Stage.TURN, Stage.DECODE) and last:
            self.passes.append(Moment(self._held(), list(self.tokens)))

    def end_prompt(self) -> None:
        """The prompt has ended, and what is held now is what was left of it."""
        self.prompt, self.passes = self._prompt_end(), []
        self.reads.clear()

    def report(self, rows: Sequence[int] | None = None, behind: Sequence[int] | None = None) -> Report:
        """The ledger of some rows together; None: of all, and as it is now.

        behind: for every row of the batch how many passes it was fed after its own last one. They do not count.
        """
        B = len(self.tokens)
        prompt, (now, padding, host) = self.prompt, self._now()
        chosen = range(B) if rows is None else rows
        ends = [self._end(0 if behind is None else behind[row], now) for row in chosen]
        means = [self._mean(row, 0 if behind is None else behind[row]) for row in chosen]
        report = Report(
            n_layers=len(self.layers),
            full=sum(sum(self._full(end.tokens[row])) for row, end in zip(chosen, ends)),
            held_end=sum(end.held[row] for row, end in zip(chosen, ends)),
            padding_end=part(padding, chosen, B),
            peak_prompt=part(self.peak_prompt, chosen, B),
            peak_decode=part(self.peak_decode, chosen, B),
            mean_decode=sum(means),
            workspace=sum(self.workspace[row] for row in chosen),
            adapter=nbytes(t for x in self.layers for t in x.adapters()),
            host=sum(host[row] for row in chosen),
            binds=self.binds,
        )
        self._add_reads(report, dict(zip(chosen, ends)), behind or [0] * B)
        if prompt is None:
            return report
        report.full_prompt = sum(sum(self._full(prompt.tokens[row])) for row in chosen)
        report.held_prompt = sum(prompt.held[row] for row in chosen)
        report.padding = part(prompt.padding, chosen, B)
        report.per_layer = [sum(held[row] for row in chosen) for held in prompt.per_layer]
        if self.binds == "held":
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
        self.reads.reorder(rows)
        before, self.tokens = len(self.tokens), taken(self.tokens, rows)
        self.workspace = taken(self.workspace, rows)
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
        self.workspace = self.workspace or [0] * B
        self.columns += T

    def _prompt_end(self) -> PromptEnd:
        layers, B = self._by_layer(), len(self.tokens)
        # the fullest row of a batch is padded by nothing: what all rows have is a place that ought to be free memory
        least = [min((n - m for n, m in zip(x.padding, x.alike or [0] * B)), default=0) for x in layers]
        surplus = self._total() - sum(sum(x.held) + sum(x.padding) for x in layers)
        more = [part(max(0, surplus), [row], B) for row in range(B)]
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

    def _add_reads(self, report: Report, ends: Mapping[int, Moment], behind: Sequence[int]) -> None:
        """What these rows have read and moved; before the first pass a step would read all that is held."""
        read, moved = self.reads.by_row(len(self.tokens))
        steps = {row: self._steps(row, behind[row]) for row in ends}
        of_layers = self._full_reads(steps)
        for row, end in ends.items():
            turns, n = self.reads.turns(behind[row]), sum(len(tokens) for _, tokens in steps[row])
            report.read_turn += sum(read[i][row] for i in turns)
            report.moved_turn += sum(moved[i][row] for i in turns)
            report.read_step += round(sum(read[i][row] for i, _ in steps[row]) / n) if n else end.held[row]
            report.moved_step += round(sum(moved[i][row] for i, _ in steps[row]) / n) if n else 0
            report.full_read += round(sum(of_row[row] for of_row in of_layers))
        if self.binds == "read":
            allowed = [x.budget_bytes([round(n) for n in full]) for x, full in zip(self.layers, of_layers)]
            report.asked = sum(of_row[row] for of_row in allowed for row in ends)

    def _steps(self, row: int, behind: int) -> list[tuple[int, range]]:
        """The passes whose steps a row's mean is over, and the row's tokens at each step of theirs."""
        moments, steps = self._moments(), []  # the prompt's end, then the passes
        for i in self.reads.counted(behind):
            before, n = (one.tokens[row] for one in moments[i : i + 2])
            if n > before:  # else the row had no token in it
                steps.append((i, range(before + 1 if self.reads.by_token[i] else n, n + 1)))
        return steps

    def _full_reads(self, steps: Mapping[int, Sequence[tuple[int, range]]]) -> list[list[float]]:
        """What a full cache would have read in a step, the mean over each row's steps, by layer and row of the batch.

        0 for a row without any. Of a sliding layer the new token is read too.
        """
        of_kind: dict[tuple[int, int | None], list[float]] = {}
        for kind in set(self._slots.values()):
            slot, window = kind
            of_kind[kind] = [0.0] * len(self.tokens)
            for row, passes in steps.items():
                seen = [n if window is None else min(n, window) for _, tokens in passes for n in tokens]
                of_kind[kind][row] = slot * sum(seen) / len(seen) if seen else 0.0
        return [of_kind[self._slots[i]] for i in sorted(self._slots)]

    def _now(self) -> tuple[Moment, int, list[int]]:
        """What is held now, by no row's slot, and on the host; the rows pay for what no layer accounts for."""
        layers, B = self._by_layer(), len(self.tokens)
        held = [sum(row) for row in zip(*(x.held for x in layers))]
        padding = sum(sum(x.padding) for x in layers)
        surplus = max(0, self._total() - sum(held) - padding)
        host = [sum(row) for row in zip(*(self._on_host(x, layer) for x, layer in zip(layers, self.layers)))]
        return Moment([n + part(surplus, [row], B) for row, n in enumerate(held)], list(self.tokens)), padding, host

    def _on_host(self, holding: Holding, layer: LayerCache) -> list[int]:
        """What of a layer lies on the host, by row: what it says, or what really does beside a device."""
        if holding.host:
            return holding.host
        there = () if self._device == "cpu" else (t for t in layer.tensors() if t.device.type == "cpu")
        return own_bytes(there, self.tokens, self.columns)

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
        held, beside = ([part(n, [row], B) for row in range(B)] for n in (size, layer.overhead()))
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
        now = [t for x in self.layers for t in (*x.workspace(), *x.scratch.values())]
        if now:
            own = own_bytes(now, self.tokens, self.columns)
            self.workspace = [max(n, m) for n, m in zip(self.workspace, own, strict=True)]
        return nbytes(now)

    def _total(self) -> int:
        return nbytes(t for x in self.layers for t in x.tensors())

    def _full(self, tokens: int) -> list[int]:
        """What a full cache of so many tokens holds, per layer; a sliding layer holds what its next query can see."""
        return [
            slot * (tokens if window is None else min(tokens, window - 1))
            for slot, window in (self._slots[i] for i in sorted(self._slots))
        ]
