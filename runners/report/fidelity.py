"""The fidelity panels of a run's cells on the screen: a table of their own, labels, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from analysis import screen, stats
from analysis.fidelity.panel import COLOURS, FAULTS, Panel, panel, sample_of
from runners.report import run_table as show
from tasks.base import Example

if TYPE_CHECKING:
    from runners.cells import Cell, Run

COLUMNS = (
    "method", "budget", "label", "KL, nats", "KL max", "same token", "clear flips", "prefix", "identical", "length",
    *FAULTS, "forced", "free", "full cut",
)  # fmt: skip
ABOUT = (
    "fidelity: KL per token and tokens that stay likeliest, of a method that reads the full cache's answer (forced); "
    "shared prefix, identical answers, length, and points more of every fault, of its own answers (free)"
)
PARTED = " forced answers part elsewhere than the free ones, by near ties or another batch"
EXACT = 1e-5  # nats: more than that before anything compressed was read is no rounding


def panels(
    run: Run, cells: Sequence[tuple[str, Cell, Mapping[str, Any]]], full: Mapping[str, Any], resamples: int
) -> list[tuple[str, Cell, Panel]]:
    """The panels of the cells that have one.

    cells: each with its name on the screen and its finished rows, by id.  full: the full cache's rows.
    """
    examples = {example.id: example for example in run.examples}
    found = []
    for name, cell, rows in cells:
        one = None if cell is run.full else of_cell(examples, cell, rows, full, run.task.metric.better, resamples)
        if one is not None:
            found.append((name, cell, one))
    return found


def of_cell(
    examples: Mapping[str, Example], cell: Cell, rows: Mapping[str, Any], full: Mapping[str, Any], better: str,
    resamples: int = stats.RESAMPLES,
) -> Panel | None:  # fmt: skip
    """The panel of a cell; None where no sample has the ids of both answers."""
    samples, less = [], cell.method.request.is_share
    for id, row in rows.items():
        if id not in full:
            continue
        tags = examples[id].tags
        subset = str(tags.get("subset", ""))
        stratum = stats.stratum(str(tags.get("category", subset)), str(tags.get("stratum", subset)))
        solved = better == "higher" and full[id]["score"] >= stats.RIGHT
        if (sample := sample_of(id, stratum, row, full[id], solved)) is not None:
            samples.append(sample)
            # also where bits or slots were given
            less |= row["ledger"]["held_prompt"] < row["ledger"]["full_prompt"] or _reads_less(row["ledger"])
    return panel(samples, less, resamples)


def _reads_less(ledger: Mapping[str, Any]) -> bool:
    return ledger.get("binds") == "read" and ledger["read_step"] < ledger["full_read"]


def table(cells: Sequence[tuple[str, Cell, Panel]]) -> Table:
    """One row per cell: its label, coloured, and the numbers behind it."""
    shown = screen.new_table(*COLUMNS, left=("label",))
    for name, cell, one in cells:
        faults = [f"{100 * fault.excess.value:+.1f}" for fault in one.faults.values()]
        shown.add_row(
            name,
            f"{cell.method.budget:g}",
            coloured(one.label),
            _number(one.kl.value if one.kl else None),
            _number(one.kl_max),
            _percent(one.agree.value if one.agree else None),
            _percent(one.clear_flips),
            _percent(one.shared_prefix.value),
            _percent(one.identical.value),
            "-" if one.out_ratio is None else f"{one.out_ratio.value:.2f}",
            *faults,
            str(one.n_forced),
            str(one.n),
            _percent(one.cut),
        )
    return shown


def coloured(label: str) -> str:
    """A label in its colour; a dash where there is none."""
    colour = COLOURS.get(label)
    return f"[{colour}]{label}[/{colour}]" if colour else label or "-"


def remarks(cells: Sequence[tuple[str, Cell, Panel]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be said of the panels; rows: of all cells."""
    said = [ABOUT] if cells else []
    for name, cell, one in cells:
        who = f"fidelity of {name} {cell.method.budget:g}"
        if one.apart:
            said.append(f"{who}: {one.apart} of {one.n_forced}{PARTED}")
        if one.faulty:
            said.append(f"{who}: the logits of {one.faulty} samples are not finite")
        if one.short:
            said.append(f"{who}: {one.short} forced answers of one token have none that counts")
        if one.uncounted and one.uncounted > EXACT and not cell.method.changes_prompt:
            said.append(f"{who}: the exact prefill is up to {one.uncounted:.2g} nats off; the two were not paired")
    failed = [row["forced"]["error"] for row in rows if "error" in row.get("forced", {})]
    if failed:
        said.append(f"the forced half of {len(failed)} answers failed: {failed[0]}")
    return said


def about_this_run(run: Run) -> list[str]:
    """What the forced half has taken of the time, and its noise floor; nothing where nothing was computed."""
    said = []
    if run.panel.began is not None and run.panel.seconds:
        said.append(f"the forced half took {run.panel.share:.0%} of the time; fidelity=off leaves it out")
    if run.panel.noise is not None:
        said.append(f"noise floor: the full cache is {run.panel.noise:.2g} nats from itself in a batch of another size")
    return said


def print_panels(
    run: Run, cells: Sequence[tuple[str, Cell, Mapping[str, Any]]], found: Sequence[tuple[str, Cell, Panel]]
) -> None:
    """Print the table of the panels and what is to be said; nothing where nothing was generated."""
    if found:
        screen.print_table(table(found))
    for line in remarks(found, [row for _, _, rows in cells for row in rows.values()]):
        show.say(line)
    for line in about_this_run(run):  # what a run that finds everything on disk does not print again
        show.note(line)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
