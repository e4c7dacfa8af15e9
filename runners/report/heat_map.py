"""The needle grid as a picture: `python -m runners.report.heat_map results/MODEL/needle-mini/METHOD-...` draws one.

Rows are depths, 0 % on top; columns are lengths; a cell is the mean score of its samples. Colours run over the whole
range of the score, whatever the data, so that two maps can be compared; a cell without samples is grey; a cross marks a
cell where the full cache fails too, which says nothing about compression.
"""

import argparse
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from analysis import records
from analysis.files import CannotWrite, given_path, picture
from methods.core.errors import UserError
from runners.records.stored import read_cell, read_samples
from runners.report import run_table as show
from runners.report.figure import panels
from tasks.base import Example

COLOURS = ("#440154", "#21918C", "#FDE725")  # worst, middling, best: viridis, told apart by every kind of colour sight
MISSING = "#BBBBBB"
SAME = ("model", "task", "protocol", "dtype", "passes")  # of a record and the full cache's beside it
FAILED = 0.5  # a score of the full cache below this says that the model cannot do the cell


@dataclass(frozen=True)
class Sample:
    """kind, length in tokens, depth in per cent: its cell.  score: in [0, 1].  full: the full cache's, if known."""

    kind: str
    length: int
    depth: float
    score: float
    full: float | None = None


def cells(rows: Iterable[Sample]) -> dict[tuple[int, float], tuple[float, float | None]]:
    """Mean score of each (length, depth), and the full cache's mean over the samples that have one."""
    members: dict[tuple[int, float], list[Sample]] = {}
    for row in rows:
        members.setdefault((row.length, row.depth), []).append(row)
    means = {}
    for cell, cell_rows in members.items():
        full = [row.full for row in cell_rows if row.full is not None]
        means[cell] = fmean(row.score for row in cell_rows), fmean(full) if full else None
    return means


def heat_map(rows: Sequence[Sample], path: Path, title: str = "") -> None:
    """Write the picture: one panel per kind, and beside it the full cache's where it is known. Raises CannotWrite."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("score", COLOURS).with_extremes(bad=MISSING)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    paired = any(row.full is not None for row in rows)
    shown = [(kind, which) for kind in kinds for which in (("method", "full") if paired else ("method",))]
    columns = 2 if paired else min(3, len(shown))
    lines = -(-len(shown) // columns)
    with panels(path, lines, columns, (4.4 * columns, 3.2 * lines)) as (figure, axes):
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        image, crossed = None, False
        for ax, (kind, which) in zip(axes.flat, shown):
            kind_rows = [row for row in rows if row.kind == kind]
            means = cells(kind_rows)
            lengths, depths = sorted({row.length for row in kind_rows}), sorted({row.depth for row in kind_rows})
            value = {cell: pair[which == "full"] for cell, pair in means.items()}
            grid = [[_number(value.get((length, depth))) for length in lengths] for depth in depths]
            image = ax.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
            if which == "method":
                for (length, depth), (_, full) in means.items():
                    if full is not None and full < FAILED:
                        dark = (value[length, depth] or 0.0) < FAILED
                        ax.text(
                            lengths.index(length), depths.index(depth), "×", ha="center", va="center",
                            color="white" if dark else "black",
                        )  # fmt: skip
                        crossed = True
            known = [one for one in value.values() if one is not None]
            mean = f", mean {fmean(known):.2f}" if known else ""
            ax.set_title(f"{kind}{', full cache' if which == 'full' else ''}{mean}, n={len(kind_rows)}", fontsize=9)
            ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, fontsize=7)
            ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
            ax.set_xlabel("length, tokens", fontsize=8)
            ax.set_ylabel("depth, %", fontsize=8)
        if image is not None:
            figure.colorbar(image, ax=axes, label="score", shrink=0.8)
        if crossed:
            figure.supxlabel("× the full cache fails here too: this cell says nothing of the method", fontsize=8)
        figure.suptitle(title, fontsize=10)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def read_record(folder: Path) -> tuple[list[Sample], str]:
    """The samples of a needle record, paired with the full cache's of the same task, and a title.

    Raises UserError if the folder is no record, or its samples are no cells of a grid.
    """
    identity, scores, _ = _read(folder)
    full = _full(folder, identity)
    rows = []
    for id, score in scores.items():
        try:
            kind, length, depth, _ = id.split("/")
            rows.append(Sample(kind, int(length), float(depth), score, full.get(id)))
        except ValueError as error:
            raise UserError(f"{folder}: sample {id} is no cell of a grid; give a record of task=needle") from error
    asked = records.PROTOCOLS.get(identity["protocol"], identity["protocol"])
    title = f"{identity['model']['name']}, {identity['method']['name']} at {identity['budget']:g}, {asked}"
    return rows, title


def draw_all(examples: Iterable[Example], folders: Iterable[Path]) -> None:
    """Draw the records of a task whose samples all have a length and a depth; of another task nothing."""
    if all(example.tags.get("length") and example.tags.get("depth") is not None for example in examples):
        try:
            for folder in folders:
                with contextlib.suppress(UserError):  # samples that have a place and no name of a cell
                    draw_heat_map(folder)
        except (CannotWrite, OSError) as error:  # best effort: a missing picture must not fail the run
            why = getattr(error, "strerror", None) or error
            show.note(f"no heat maps: {why}; python -m {__name__} RECORD draws them later")


def draw_heat_map(folder: Path, path: Path | None = None) -> Path | None:
    """Draw a record, into its own folder unless `path` says where; None if it has no finished sample.

    Raises UserError if the folder is no record, or its samples are no cells of a grid; and CannotWrite.
    """
    rows, title = read_record(folder)
    if not rows:
        return None
    path = path or folder / "heat_map.png"
    heat_map(rows, path, title)
    return path


def _full(folder: Path, identity: dict[str, Any]) -> dict[str, float]:
    """The full cache's scores, by the newest of its records that was asked the same in the same way and has any."""
    newest, full = "", dict[str, float]()
    for other in sorted(folder.parent.glob("full-*")):
        try:
            theirs, scores, began = _read(other)
        except UserError as error:  # of one generation of several
            show.note(f"drawn without the full cache of {error}")
            continue
        if scores and began >= newest and all(theirs.get(key) == identity.get(key) for key in SAME):
            newest, full = began, scores
    return full


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, float], str]:
    """A record's identity, the scores of its finished samples, and when its last run began."""
    book = read_cell(folder, records.IDENTITY | {"runs": records.RUNS})
    rows = read_samples(folder / "samples.jsonl", records.SCORED)
    scores = {row["id"]: row["score"] for row in rows if "error" not in row}
    return book["identity"], scores, str(book["runs"][-1].get("began", ""))


def main() -> None:
    """Draw one record into its own folder, or where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=given_path)
    parser.add_argument("--out", type=given_path)
    given = parser.parse_args()
    try:
        print(draw_heat_map(given.record, picture(given.out)) or f"{given.record}: holds no finished sample")
    except (UserError, CannotWrite) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
