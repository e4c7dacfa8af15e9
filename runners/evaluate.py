"""Answer a task's samples with a method and with the full cache, score both, record every sample, print the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from analysis import screen
from analysis.records import above
from methods.core.errors import BudgetMiss, UserError
from methods.core.typed import Count
from runners import pair
from runners.base import Runner
from runners.cells import Run
from runners.records.record import check_writable
from runners.report import fidelity, remarks
from runners.report import run_table as show
from runners.report import sweep_table as overview
from runners.report.compare import compare_scores
from runners.report.heat_map import draw_all
from runners.report.latency_report import show_times
from runners.report.read_bytes import read_rows
from runners.report.wandb_runs import track
from runners.settings import auto
from runners.settings.parts import task_of
from runners.sweep import Sweep
from tasks.base import Task

# failed samples that are named on screen; the record has them all
SHOWN_FAILURES = 3


@dataclass
class Evaluate(Runner):
    """The runner behind `python run.py`: one cell and, for comparison, the full cache on the same samples.

    Where it can be, each prompt is read once for both, but for a few samples whose speeds are shown. In a sweep it is
    read once for all cells that differ in their method only.
    resamples: bootstrap resamples behind the intervals.
    """

    resamples: Count = 2000

    def run(self, cfg: DictConfig) -> int:
        """The exit code: 0, 1 if a sample failed or budget_miss=fail stopped the run, 130 after Ctrl-C.

        Raises UserError for what the user gave and cannot work; finished samples are kept in every case.
        """
        results = Path(cfg.results).expanduser()
        trouble = None
        try:
            check_writable(results)
        except UserError as error:
            if not results.is_dir():
                raise
            trouble = error  # what is finished there can be shown all the same
        if cfg.cells is not None:
            sweep = Sweep(cfg, results)
            if trouble and sweep.members and not sweep.is_finished:
                raise trouble
            return self._sweep(sweep)
        if cfg.references:
            raise UserError("references=true: its rows stand beside those of a sweep; add -m, or leave it out")
        task: Task = task_of(cfg)
        show.source(auto.told(task.name), task.source())
        run = Run(cfg, task, results, HydraConfig.get().runtime.choices["method"])
        if cfg.dry_run:
            return self._sweep(Sweep.of(run))
        if trouble and not run.is_finished:
            raise trouble
        try:
            code = self._cells(run)
        except KeyboardInterrupt:
            done = len(run.finished(run.cell)) if run.cell.method is not run.full.method else 0
            kept = f"{len(run.finished(run.full))} samples of the full cache"
            if run.cell.method is not run.full.method:
                kept += f" and {done} of {run.cell.name}"
            show.note(f"stopped; {kept} are kept in {results}, the same command goes on from there")
            return 130
        track(run, run.cells, self.resamples)
        return code

    def _sweep(self, sweep: Sweep) -> int:
        if not sweep.members:  # none could be composed, which has been said
            return sweep.code
        if sweep.cfg.dry_run:
            overview.dry_run(sweep)
            return sweep.code
        try:
            sweep.work()
        except KeyboardInterrupt:
            kept = sum(len(member.record.finished) for member in sweep.members)
            show.note(f"stopped; {kept} samples of {len(sweep.members)} cells are kept in {sweep.cfg.results}, "
                      "the same command goes on from there")  # fmt: skip
            return 130
        code = overview.report_sweep(sweep, self.resamples)
        track(sweep.run, [member.cell for member in sweep.members], self.resamples)
        return code

    def _cells(self, run: Run) -> int:
        try:
            pair.complete(run)
        except BudgetMiss as miss:
            show.note(f"failed: budget={run.cfg.budget} is missed and budget_miss=fail: {miss}")
            return 1
        return self._report(run)

    def _report(self, run: Run) -> int:
        if run.timed:
            self._show_times(run)
        else:
            self._show_scores(run)
        if run.cell.method.simulated:
            show.say(f"{run.cell.name} only simulates its saving: bytes and speeds are not those of a real one")
        show.say(f"record: {run.cell.record.folder}")
        return self._failures(run)

    def _show_times(self, run: Run) -> None:
        rows = list(run.finished(run.cell).values())
        if rows:
            label = run.cell.name if run.cell is run.full else f"{run.cell.name} {run.cell.method.budget:g}"
            show_times([(label, rows, run.cell.record.folder)], run.checkpoint.name)
            show.say(f"{run.settings([(row, row) for row in rows])}, kernels={run.backend}")

    def _show_scores(self, run: Run) -> None:
        ours, full = run.finished(run.cell), run.finished(run.full)
        both = [example for example in run.examples if example.id in ours and example.id in full]
        label = "" if run.cell is run.full else run.cell.name
        if both:
            if paired := run.scored(ours, full):
                screen.print_table(show.scores(compare_scores(run.task, paired, self.resamples, seed=0), label))
            for line in [
                *show.about(run.task.metric),
                *run.task.remarks(
                    [
                        (example, *answers)
                        for example in both
                        for answers in zip(
                            *(remarks.each_answer(rows[example.id]) for rows in (ours, full)), strict=True
                        )
                    ]
                ),
            ]:
                show.say(line)
            pairs = [(ours[example.id], full[example.id]) for example in both]
            screen.print_table(show.costs(cost_rows(pairs), label))
            cut = sum(row["cut"] for row, _ in pairs)
            show.say(f"{run.settings(pairs)}; {cut} of {len(both)} samples cut in the middle")
            samples = [row for row, _ in pairs]
            if run.cell is not run.full and (exact := remarks.by_prefill(samples)):
                show.say(f"{exact}, which no method changes; last_token=held lets the compressed cache answer")
            for line in remarks.reasoning(samples, run.reasoning):
                show.say(line)
            cells = [(run.cell.name, run.cell, ours)]
            fidelity.print_panels(run, cells, fidelity.panels(run, cells, full, self.resamples))
            draw_all(run.examples, [cell.record.folder for cell in run.cells])

    def _failures(self, run: Run) -> int:
        code = 0
        for cell in run.cells:
            rows = run.rows(cell)
            if (lost := len(run.examples) - len(rows)) and not run.only_shows:
                show.note(
                    f"failed: {lost} of {len(run.examples)} samples with {cell.name} are not in {cell.record.folder}, "
                    "from which they were deleted; the same command computes them"
                )
                code = 1
            failed = {id: row["error"] for id, row in rows.items() if "error" in row}
            if not failed:
                continue
            named = "; ".join(f"{id} ({error})" for id, error in list(failed.items())[:SHOWN_FAILURES])
            more = f"; {len(failed) - SHOWN_FAILURES} more in the record" if len(failed) > SHOWN_FAILURES else ""
            show.note(
                f"failed: {len(failed)} of {len(run.examples)} samples with {cell.name}: {named}{more}; "
                "the same command tries them again"
            )
            code = 1
        return code


def cost_rows(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """Bytes and speeds of samples (the method's row, the full cache's row): (what, the method's, the full cache's).

    Bytes are means per sample, with their share of what a full cache of the same tokens takes; speeds are medians of
    the samples that ran alone, whose number is said where there are others.
    """
    ours, full = _costs([row for row, _ in pairs]), _costs([row for _, row in pairs])
    return [(what, ours[what], full.get(what, "-")) for what in ours]


def _costs(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One column of the table: what was measured, and its mean or median over samples."""
    costs = {}
    for what, key, whole in (
        ("KV bytes, end of prompt", "held_prompt", "full_prompt"),
        ("KV bytes, end of generation", "held_end", "full"),
    ):
        held, of = (fmean(row["ledger"][name] for row in rows) for name in (key, whole))
        costs[what] = f"{show.size(held)} ({show.share(held, of)})"
    costs |= read_rows(rows)
    if n := sum(map(above, rows)):
        costs["samples above the budget"] = f"{n} of {len(rows)}"
    coded = [row["ledger"] for row in rows if row["ledger"].get("nominal_bits") is not None]
    if coded:
        nominal, effective = (fmean(ledger[name] for ledger in coded) for name in ("nominal_bits", "effective_bits"))
        costs["bits per number, as codes / in all"] = f"{nominal:.2f} / {effective:.2f}"
    # a group's times are not those of any of its members
    times = [row["timings"] for row in rows if "group" not in row]
    reads = [time["n_prompt"] / time["prompt"] for time in times if time["prompt"]]
    steps = [1000 * time["decode"] / time["steps"] for time in times if time["steps"]]
    n_alone = "" if len(times) == len(rows) else f" (n={len(times)})"
    costs["prefill, tokens/s"] = f"{median(reads):,.0f}{n_alone}" if reads else "-"
    costs["decode, ms/token"] = f"{median(steps):.2f}{n_alone}" if steps else "-"
    return costs
