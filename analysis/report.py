"""One self-contained page of everything in a result folder: `python -m analysis.report RESULTS` writes report.html.

The page needs no network: plotly and the data are inside, compressed. Model output and data are text for it, never
markup.
"""

import argparse
import base64
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import style
from analysis.area import areas
from analysis.command import RESULTS, Command
from analysis.files import check_out, write
from analysis.load import NothingToRead, Results, load_results, sample_texts
from analysis.paired import KEYS, WHOLE
from analysis.points import on_front, points
from analysis.rows import LEDGER
from analysis.stats import RIGHT

TEMPLATE = Path(__file__).parent / "pages" / "report.html.j2"
TEXT_BYTES = 4_000_000  # of all flipped samples together, before they are compressed
TEXT_CHARACTERS = 400  # of one text
FLIPS = 20  # samples per cell and category, at most
NUMBERS = [
    "budget", "n", "seeds", "share", "read", "bytes", "score", "score_low", "score_high", "full", "difference",
    "difference_low", "difference_high", "retained", "retained_low", "retained_high", "lost", "won", "p_flips",
    "p_holm", "worst_difference", "digits", "kl", "agree", "clear_flips", "shared_prefix", "identical", "out_ratio",
    "n_forced", "n_free",
]  # fmt: skip
WORDS = [*KEYS, "category", "label", "method", "bits", "family", "unit", "metric", "better", "worst", "fidelity"]
SWITCHES = ["simulated", "tie", "near_chance", "partial", "front", "off_axis"]


def page(results: Results) -> str:
    """The page as HTML. Raises NothingToRead if there is no finished cell with a full cache beside it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    table = points(results)
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    data = contents(results, table.assign(front=on_front(table)))
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(data=packed(text), plotly=packed(get_plotlyjs()))


def packed(text: str) -> str:
    """Letters, digits, + and / only, whatever the text: it can stand anywhere in a page."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def contents(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """What the page shows: points by column, areas, cells with ledgers, speeds and maps, samples that flipped."""
    columns: dict[str, list] = {name: table[name].tolist() for name in WORDS + SWITCHES}
    columns |= {name: _rounded(table[name]) for name in NUMBERS}
    columns["cells"], columns["full_cells"] = table["cells"].tolist(), table["full_cells"].tolist()
    named = sorted({cell for column in ("cells", "full_cells") for cells in table[column] for cell in cells})
    looks = style.looks(dict(zip(table["label"], table["family"])))
    looks["full"] = style.Look("#888888", "o", "-", False)
    return {
        "points": columns,
        "areas": _areas(areas(results, table)),
        "looks": {label: _plotly(look) for label, look in looks.items()},
        "cells": {cell: _cell(results, cell) for cell in named},
        **_flips(results, table),
        "problems": results.problems,
        "whole": WHOLE,
    }


def _areas(under: pd.DataFrame) -> list[dict[str, Any]]:
    """The areas by row, with null for what a row has none of."""
    rounded = [row | {"from": round(row["from"], 4)} for row in under.to_dict(orient="records")]
    return [{key: None if pd.isna(value) else value for key, value in row.items()} for row in rounded]


def _rounded(column: pd.Series) -> list[float | None]:
    return [None if pd.isna(v) else round(float(v), 4) for v in column]


def _cell(results: Results, cell: str) -> dict[str, Any]:
    """The command and fingerprints of one cell, its ledger in all and by layer, its speeds, its heat map."""
    book = results.cells.loc[cell]
    rows = results.by_cell.get(cell, results.finished.iloc[:0])
    alone = rows[rows["alone"] & (rows["prompt_s"] > 0)]
    steps = alone[alone["steps"] > 0]
    told = ("command", "commit", "weights", "dtype", "passes", "fingerprint", "config")
    return {
        **{name: book[name] for name in told},
        "conditions": [json.dumps(c, sort_keys=True) for c in book["conditions"]],
        "seed": int(book["seed"]),
        "failed": results.failed.get(cell, 0),
        "errors": results.errors.get(cell, []),
        "ledger": {name: book["ledger"].get(name, 0) for name in LEDGER} if book["ledger"] else {},
        "layers": book["layers"],
        "prompt": None if alone.empty else round(float((alone["n_prompt"] / alone["prompt_s"]).median()), 1),
        "decode": None if steps.empty else round(float((1000 * steps["decode_s"] / steps["steps"]).median()), 3),
        "timed": len(alone),
        "maps": _maps(rows),
    }


def _maps(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Mean score by length and depth of all samples and of each category, where they have both."""
    placed = rows.dropna(subset=["length", "depth"])
    if placed.empty:
        return {}
    return {WHOLE: _map(placed)} | {str(name): _map(part) for name, part in placed.groupby("category")}


def _map(placed: pd.DataFrame) -> dict[str, Any]:
    grid = placed.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
    return {
        "lengths": [float(x) for x in grid.columns],
        "depths": [float(x) for x in grid.index],
        "score": [[None if pd.isna(v) else round(float(v), 3) for v in row] for row in grid.to_numpy()],
    }


def _flips(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """By cell, samples that the full cache solves and the method does not, or the other way round.

    Of a category up to FLIPS, taken from its subsets in turn; `flipped` counts all of them by category.
    `samples` has by the full cache's cell what they share: prompt end, references, the full cache's answer and score.
    """
    whole = table[(table["category"] == WHOLE) & (table["better"] == "higher") & (table["method"] != "full")]
    by_cell: dict[str, tuple[str, list[str]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for _, row in whole.iterrows():
        full = next(cell for cell in row["full_cells"] if cell in results.by_cell)
        theirs = results.by_cell[full]["score"]
        for cell in row["cells"]:
            scores = results.by_cell[cell]
            both = theirs.reindex(scores.index)
            flipped = scores[both.notna() & ((scores["score"] >= RIGHT) != (both >= RIGHT))]
            by_cell[cell] = (full, [str(i) for i in spread(flipped).index])
            counts[cell] = {str(name): len(part) for name, part in flipped.groupby("category")}
    shared = {
        full: {i for other, ids in by_cell.values() if other == full for i in ids} for full, _ in by_cell.values()
    }
    count = sum(len(ids) for _, ids in by_cell.values()) + 3 * sum(map(len, shared.values()))
    each = min(TEXT_CHARACTERS, TEXT_BYTES // max(1, count))
    flips, samples = {}, {}
    for full, ids in shared.items():
        samples[full] = {
            i: {
                "prompt": _end(row.get("prompt_end", ""), each),
                "answers": [_start(str(a), each) for a in row.get("answers", [])[:3]],
                "full": _start(str(row.get("prediction", "")), each),
                "score": round(float(row["score"]), 3),
            }
            for i, row in sample_texts(results, full, ids).items()
        }
    for cell, (full, names) in by_cell.items():
        ours = sample_texts(results, cell, set(names))
        categories = results.by_cell[cell]["category"]
        flips[cell] = {
            "of": full,
            "flipped": counts[cell],
            "samples": [
                [i, round(float(ours[i]["score"]), 3), _start(str(ours[i].get("prediction", "")), each), categories[i]]
                for i in names
                if i in ours and i in samples[full]
            ],
        }
    return {"flips": flips, "samples": samples}


def spread(flipped: pd.DataFrame) -> pd.DataFrame:
    """Up to FLIPS rows of each category, from its subsets in turn."""
    turn = flipped.groupby(["category", "subset"]).cumcount()
    in_turn = flipped.assign(turn=turn).sort_values(["turn", "category", "subset"], kind="stable")
    return in_turn[in_turn.groupby("category").cumcount() < FLIPS]


def _start(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most:]


def _plotly(look: style.Look) -> dict[str, Any]:
    symbols = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
               "X": "x", "*": "star", "d": "diamond-tall", "p": "pentagon"}  # fmt: skip
    dashes = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
    symbol = symbols[look.marker] + ("-dot" if look.fill else "")
    return {
        "colour": look.colour, "symbol": symbol, "dash": dashes[look.stroke], "ringed": look.ringed,
    }  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("--wandb", action="store_true", help="a W&B Report as well: its JSON, sent if it can be")
    parser.add_argument("--project", default="kvfrontier", help="of the W&B Report")
    parser.add_argument("--entity", default="", help="of the W&B Report (default: the account's own)")


def run(given: argparse.Namespace) -> int:
    """Make the page and write it. Raises NothingToRead and CannotWrite."""
    check_out(given.out, is_file=True)
    results = load_results(given.results, given.all_generations)
    html = page(results)
    for problem in results.problems:
        print(problem, file=sys.stderr)
    out = given.out or (given.results if given.results.is_dir() else given.results.parent) / "report.html"
    write(out, html)
    print(f"{len(results.cells)} cells, {out.stat().st_size / 2**20:.1f} MiB: {out}")
    if given.wandb:
        from analysis.pages import wandb_report

        print(wandb_report.make(results, out.with_suffix(".wandb.json"), given.project, given.entity))
    return 0


main = Command(
    "report", __doc__ or "", run, options, results="a folder of records, or a file of them (default: results)",
    default=RESULTS, out="the file (default: RESULTS/report.html)",
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
