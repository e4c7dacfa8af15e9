"""What a run prints: progress while it works, the result table when it is done. Pure display."""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from analysis import screen
from runners.report.compare import Compared
from tasks.table import Metric

# seconds between two lines of progress where there is no terminal to draw a bar on
PLAIN_EVERY = 15.0
# and the longest that nothing is said for
LONGEST_SILENCE = 240.0


def say(text: str) -> None:
    """One line of result, on standard output."""
    print(text, flush=True)


def source(*lines: str | None) -> None:
    """The lines before all others, those of them that there are: which model was taken, which data."""
    for line in lines:
        if line:
            say(line)


def note(text: str) -> None:
    """One line about the run itself, on standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Place:
    """Which group of a sweep this is.

    began: when the first one did, in seconds of time.time; None where groups do not run one after the other.
    """

    number: int
    of: int
    began: float | None = None

    def left(self, share: float) -> float | None:
        """Seconds until all groups are done if the rest takes as long as what is; share: of this group that is done."""
        done = self.number - 1 + share
        if self.began is None or not done:
            return None
        return (time.time() - self.began) / done * (self.of - done)


class Bar:
    """Progress over samples, with the time left; a line now and then where standard error is no terminal.

    The lines come also while one sample takes long, from the first one on.
    place: of the group whose samples these are, in a sweep of several.
    """

    def __init__(self, label: str, total: int, place: Place | None = None):
        self.label = f"group {place.number} of {place.of}, {label}" if place else label
        self.total, self.place, self.done, self.failed = total, place, 0, 0
        self.began = self.shown = time.monotonic()
        self.ended = threading.Event()
        self.lines = threading.Thread(target=self._go_on_saying, daemon=True)
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("samples"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rest]}"),
                console=console,
            )
            self.task = self.bar.add_task(self.label, total=total, rest="")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        else:
            self.lines.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()
            return
        self.ended.set()
        self.lines.join()

    def advance(self, samples: int, failed: int = 0) -> None:
        """So many more samples are done. failed: answers among them, of any cell, that could not be had."""
        self.done += samples
        self.failed += failed
        if self.bar:
            self.bar.update(self.task, advance=samples, rest=self._rest())
            return
        if time.monotonic() - self.shown >= PLAIN_EVERY or self.done == self.total:
            self._say()

    def _say(self) -> None:
        self.shown = time.monotonic()
        spent = self.shown - self.began
        left = ""
        if self.done:
            left = f", about {duration(spent / self.done * (self.total - self.done))} left"
        more = f"; {rest}" if (rest := self._rest()) else ""
        note(f"{self.label}: {self.done}/{self.total} samples, {duration(spent)}{left}{more}")

    def _go_on_saying(self) -> None:
        """A line after each silence; twice as long from one to the next, so that a night's log stays short."""
        silence = PLAIN_EVERY
        while not self.ended.wait(max(0.0, self.shown + silence - time.monotonic())):
            if time.monotonic() - self.shown >= silence:
                self._say()
                silence = min(2 * silence, LONGEST_SILENCE)

    def _rest(self) -> str:
        """What has failed so far, and how long all groups will take."""
        parts = [f"{self.failed} failed"] if self.failed else []
        left = self.place.left(self.done / self.total) if self.place else None
        if left is not None:
            parts.append(f"all groups about {duration(left)}")
        return ", ".join(parts)


def scores(rows: Sequence[Compared], method: str) -> Table:
    """Scores of the method and of the full cache, and their difference. A method of "" is the full cache alone."""
    table = screen.new_table("task", "n", *([method, "full", "difference", "95 % interval"] if method else ["full"]))
    kind = rows[0].row.kind if rows else ""
    for one in rows:
        if one.row.kind != kind and {kind, one.row.kind} & {"subset", "category"} and one.row.kind != "bin":
            if kind != "bin":
                table.add_section()
            kind = one.row.kind
        cells = [one.row.name, str(one.row.n)]
        if method:
            cells += [
                points(one.row.score, one.digits),
                points(one.full.score, one.digits),
                signed(one.difference, one.digits),
                interval(one.interval, one.digits),
            ]
        else:
            cells += [points(one.full.score, one.digits)]
        table.add_row(*cells)
    return table


def about(metric: Metric) -> list[str]:
    """What the scores are, where they are not points of 100."""
    if metric == Metric():
        return []
    return [f"{metric.name}: {metric.unit}, {metric.better} is better"]


def costs(rows: Sequence[tuple[str, str, str]], method: str) -> Table:
    """Bytes and speeds: (what, the method's, the full cache's)."""
    table = screen.new_table("per sample", *[method] * bool(method), "full")
    for what, ours, full in rows:
        table.add_row(*([what, ours, full] if method else [what, full]))
    return table


def size(n: float | None) -> str:
    """Bytes in a readable unit, exact to three digits."""
    if n is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}" if n < 1000 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent; a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "-"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def points(score: float | None, digits: int) -> str:
    """A score to its decimals; "-" for none."""
    return "-" if score is None else f"{score:.{digits}f}"


def signed(points: float | None, digits: int) -> str:
    """A difference with its sign; "-" for none."""
    return "-" if points is None else f"{points:+.{digits}f}"


def interval(interval: tuple[float, float] | None, digits: int) -> str:
    """An interval, signs shown; "-" for none."""
    return "-" if interval is None else f"{interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"
