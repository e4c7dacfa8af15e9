"""The times of task=latency as a table and as a picture.

`python -m runners.report.latency_report RECORD... --out FILE` draws the records of one model in one picture.

A ratio is formed inside a round, of the method's time and the full cache's, which took turns: what else the machine did
hits both. Shown are the median of the rounds' ratios, and their lowest and highest.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from analysis import records, screen, style
from analysis.files import CannotWrite, given_path, picture
from methods.core.errors import UserError
from runners.records.stored import read_cell, read_samples
from runners.report import run_table as show
from runners.report.figure import panels

Rows = Sequence[Mapping[str, Any]]


class Point(NamedTuple):
    """prompts, steps: seconds of every round.  held: bytes of the batch at the end of the prompt, padding included."""

    length: int
    prompts: list[float]
    steps: list[float]
    held: float


def latency_table(cells: Sequence[tuple[str, Rows]]) -> Table:
    """One line per cell, length and batch; cells: labels and recorded samples."""
    shown = screen.new_table(
        "method", "tokens", "batch", "prompt, ms", "against full", "decode, ms/token", "against full", "tokens/s",
        "KV held", "of full", "KV read", "KV peak",
    )  # fmt: skip
    for label, rows in cells:
        for row in rows:
            times, batch = row["times"], row["batch"]
            book, padding = row["ledger"], row["ledger"].get("padding", 0)
            step = median(times["steps"])
            shown.add_row(
                label,
                f"{row['tokens_in']:,}",
                str(batch),
                f"{1000 * median(times['prompts']):,.1f}",
                against(row, "prompts"),
                f"{1000 * step:.2f}",
                against(row, "steps"),
                f"{batch / step:,.0f}",
                show.size(batch * (book["held_prompt"] + padding)),
                show.share(book["held_prompt"], book["full_prompt"]),
                show.size(batch * book["read_step"]),
                show.size(batch * max(book["peak_prompt"], book["peak_decode"])),
            )
        shown.add_section()
    return shown


def show_times(cells: Sequence[tuple[str, Rows, Path]], title: str) -> None:
    """Print the table of cells (label, samples, folder of the record), and draw each into its folder."""
    screen.print_table(latency_table([(label, rows) for label, rows, _ in cells]))
    show.say("against full: time over the full cache's, taken in turns; median of the rounds, lowest to highest")
    for label, rows, folder in cells:
        if rows:
            try:
                draw_latency([(label, rows)], folder / "latency.png", f"{title}, {label}")
            except CannotWrite as error:  # best effort: a missing picture must not fail the run
                show.note(f"no pictures: {error}; python -m {__name__} RECORD draws them later")
                return


def against(row: Mapping[str, Any], what: str) -> str:
    """The method's time over the full cache's, of "prompts" or "steps": median (lowest to highest) of the rounds."""
    if "full_times" not in row:
        return "-"
    per_round = ratios(row, what)
    return f"{median(per_round):.2f} ({min(per_round):.2f} to {max(per_round):.2f})"


def ratios(row: Mapping[str, Any], what: str) -> list[float]:
    """Of every round, the method's time over the full cache's in the same round."""
    return [ours / full for ours, full in zip(row["times"][what], row["full_times"][what], strict=True)]


def draw_latency(cells: Sequence[tuple[str, Rows]], path: Path, title: str = "") -> None:
    """Write the picture: one line of panels per batch size, one column each for prompt, decoding and bytes.

    Points are medians of the rounds, bars their lowest and highest.  Raises CannotWrite.
    """
    batches = sorted({row["batch"] for _, rows in cells for row in rows})
    measures = ("prompt, s", "decode, ms per token", "KV cache at the end of the prompt, MiB")
    look = looks([label for label, _ in cells])
    with panels(path, len(batches), len(measures), (11, 0.6 + 2.7 * len(batches))) as (figure, axes):
        for line, batch in zip(axes, batches):
            for axis, what in zip(line, measures):
                axis.set_title(f"{what}, batch {batch}", fontsize=9)
                axis.set_xlabel("prompt, tokens", fontsize=8)
                axis.tick_params(labelsize=8)
            for label, points in curves(cells, batch).items():
                lengths = [point.length for point in points]
                _bars(line[0], lengths, [point.prompts for point in points], look[label])
                _bars(line[1], lengths, [[1000 * step for step in point.steps] for point in points], look[label])
                line[2].plot(lengths, [point.held / 2**20 for point in points], **look[label])
            for axis in line:
                axis.set_ylim(bottom=0)
                axis.set_xlim(left=0)
        axes[0][0].legend(fontsize=8)
        figure.suptitle(title, fontsize=10)


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each curve is drawn, the same in all panels and all pictures, whichever curves they have."""
    styles = {}
    for label in dict.fromkeys(labels):
        drawn = style.line(style.look(label, "other"), hollow=False)
        styles[label] = {**drawn, "marker": "o", "markersize": 3, "label": label}
    full = {"marker": "o", "markersize": 3, "label": "full", "color": "black", "linestyle": "--"}
    return {**styles, "full": full}


def _bars(axis: Any, lengths: Sequence[int], rounds: Sequence[Sequence[float]], look: Mapping[str, Any]) -> None:
    """A line through the medians of the rounds, with bars from the lowest to the highest."""
    middle = [median(values) for values in rounds]
    below = [m - min(values) for m, values in zip(middle, rounds)]
    above = [max(values) - m for m, values in zip(middle, rounds)]
    axis.errorbar(lengths, middle, yerr=[below, above], capsize=2, **look)


def curves(cells: Sequence[tuple[str, Rows]], batch: int) -> dict[str, list[Point]]:
    """What is drawn for one batch size, by label; the full cache's points come from a cell that took turns with it.

    Only lengths that no such cell has are taken from the full cache's own.
    """
    by_label: dict[str, dict[int, Point]] = {}
    for label, rows in sorted(cells, key=lambda cell: cell[0] == "full"):
        for row in rows:
            if row["batch"] != batch:
                continue
            length, book = row["tokens_in"], row["ledger"]
            held = batch * (book["held_prompt"] + book.get("padding", 0))
            point = Point(length, row["times"]["prompts"], row["times"]["steps"], held)
            by_label.setdefault(label, {}).setdefault(length, point)
            if "full_times" in row:
                held = batch * book["full_prompt"]
                full = Point(length, row["full_times"]["prompts"], row["full_times"]["steps"], held)
                by_label.setdefault("full", {}).setdefault(length, full)
    return {label: sorted(points.values()) for label, points in by_label.items()}


def read(folder: Path) -> tuple[str, Rows, str]:
    """A record's label, its finished samples, and its model. Raises UserError if it is none of task=latency."""
    identity = read_cell(folder, records.IDENTITY)["identity"]
    path = folder / "samples.jsonl"
    if not any("times" in row for row in read_samples(path, records.SAMPLE)):
        raise UserError(f"{folder}: holds no times; give a record of task=latency")
    rows = {row["id"]: row for row in read_samples(path, records.TIMED)}
    label = identity["method"]["name"]
    if label != "full":
        label = f"{label} {identity['budget']:g}"
    finished = [row for row in rows.values() if "error" not in row]
    model = f"{identity['model']['name']}, {identity['dtype']}"
    if not finished:
        raise UserError(f"{folder}: holds no finished sample")
    threads = finished[0]["threads"]
    return label, finished, f"{model}, {threads} thread{'' if threads == 1 else 's'}"


def main() -> None:
    """Draw records, of one model, into one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=given_path, nargs="+", metavar="RECORD")
    parser.add_argument(
        "--out", type=given_path, help="the picture; by default latency.png in the first record's folder"
    )
    given = parser.parse_args()
    try:
        path = picture(given.out) or given.records[0] / "latency.png"
        records = [read(folder) for folder in given.records]
        if len({model for *_, model in records}) > 1:
            raise UserError(f"{', '.join(sorted({model for *_, model in records}))}: give records of one model")
        draw_latency([(label, rows) for label, rows, _ in records], path, records[0][2])
    except (UserError, CannotWrite) as error:
        parser.exit(2, f"error: {error}\n")
    print(path)


if __name__ == "__main__":
    main()
