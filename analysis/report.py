"""One self-contained page of everything in a result folder: `python -m analysis.report RESULTS` writes report.html.

The page needs no network: plotly is inside, compressed. Model output and data are text for it, never markup.
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
from analysis.load import NothingToRead, Results, load, texts
from analysis.points import KEYS, WHOLE, on_front, points
from analysis.stats import RIGHT

TEMPLATE = Path(__file__).parent / "report.html.j2"
TEXT_BYTES = 1_500_000  # of all flipped samples together
TEXT_CHARACTERS = 400  # of one text
FLIPS = 20  # samples per cell, at most
NUMBERS = [
    "budget", "n", "share", "bytes", "score", "score_low", "score_high", "full", "difference", "difference_low",
    "difference_high", "retained", "lost", "won", "p_holm", "worst_difference",
]  # fmt: skip
WORDS = ["model", "task", "protocol", "category", "label", "family", "unit", "metric", "better", "worst"]
SWITCHES = ["simulated", "tie", "near_chance", "front"]


def page(results: Results) -> str:
    """The page as HTML. Raises NothingToRead if there is no finished cell with a full cache beside it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    table = points(results)
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    data = contents(results, table.assign(front=on_front(table)))
    plotly = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9)).decode()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    return template.render(data=script_text(data), plotly=plotly)


def script_text(data: Any) -> str:
    """JSON that can stand inside a script element, whatever strings it holds."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def contents(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """What the page shows: points by column, cells, ledgers, speeds, maps and flipped samples."""
    columns: dict[str, list] = {name: table[name].tolist() for name in WORDS + SWITCHES}
    columns |= {name: [None if pd.isna(v) else round(float(v), 4) for v in table[name]] for name in NUMBERS}
    columns["cell"] = [cells[0] for cells in table["cells"]]
    labels = sorted(set(table["label"]))
    return {
        "points": columns,
        "colours": style.colours(labels),
        "markers": {f: _plotly_marker(f) for f in sorted(set(table["family"]))},
        "cells": {cell: _cell(results, cell) for cell in sorted({c for cells in table["cells"] for c in cells})},
        "flips": _flips(results, table),
        "problems": results.problems,
        "whole": WHOLE,
    }


def _cell(results: Results, cell: str) -> dict[str, Any]:
    """The command and fingerprints of one cell, its ledger by layer, its speeds, its heat map."""
    book = results.cells.loc[cell]
    own = results.finished[results.finished["cell"] == cell]
    first = texts(results, cell, set(own["id"][:1]))
    layers = next((row["ledger"].get("per_layer", []) for row in first.values()), [])
    alone = own[own["prompt_s"] > 0]
    steps = alone[alone["steps"] > 0]
    return {
        "command": book["command"],
        "commit": book["commit"],
        "weights": book["weights"],
        "config": book["config"],
        "conditions": [json.dumps(c, sort_keys=True) for c in book["conditions"]],
        "seed": int(book["seed"]),
        "failed": int((results.samples[results.samples["cell"] == cell]["error"] != "").sum()),
        "layers": [int(b) for b in layers],
        "prompt": None if alone.empty else round(float((alone["n_prompt"] / alone["prompt_s"]).median()), 1),
        "decode": None if steps.empty else round(float((1000 * steps["decode_s"] / steps["steps"]).median()), 3),
        "held_end": round(float(own["held_end"].mean()), 4) if len(own) else None,
        "peak": round(float(own["peak"].mean()), 4) if len(own) else None,
        "map": _map(own),
    }


def _map(own: pd.DataFrame) -> dict[str, Any] | None:
    """Mean score by length and depth, for tasks whose samples have both."""
    placed = own.dropna(subset=["length", "depth"])
    if placed.empty:
        return None
    grid = placed.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
    return {
        "lengths": [float(x) for x in grid.columns],
        "depths": [float(x) for x in grid.index],
        "score": [[None if pd.isna(v) else round(float(v), 3) for v in row] for row in grid.to_numpy()],
    }


def _flips(results: Results, table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """By cell, samples that the full cache solves and the method does not, or the other way round."""
    whole = table[(table["category"] == WHOLE) & (table["better"] == "higher")]
    finished = results.finished.set_index(["cell", "id"])["score"]
    full_of = {tuple(row[k] for k in KEYS): row["cells"][0] for _, row in whole[whole["method"] == "full"].iterrows()}
    found: dict[str, tuple[str, list[str]]] = {}
    for _, row in whole[whole["method"] != "full"].iterrows():
        full = full_of[tuple(row[k] for k in KEYS)]
        for cell in row["cells"]:
            both = pd.concat([finished[cell], finished[full]], axis=1, keys=["ours", "full"], join="inner")
            flipped = both[(both["ours"] >= RIGHT) != (both["full"] >= RIGHT)]
            found[cell] = (full, sorted(flipped.index)[:FLIPS])
    each = min(TEXT_CHARACTERS, TEXT_BYTES // max(1, 4 * sum(len(ids) for _, ids in found.values())))
    made = {}
    for cell, (full, ids) in found.items():
        ours, theirs = texts(results, cell, set(ids)), texts(results, full, set(ids))
        made[cell] = [
            {
                "id": i,
                "prompt": _end(ours[i].get("prompt_end", ""), each),
                "answers": [_start(str(a), each) for a in ours[i].get("answers", [])[:3]],
                "full": _start(str(theirs[i].get("prediction", "")), each),
                "ours": _start(str(ours[i].get("prediction", "")), each),
                "score": round(float(ours[i]["score"]), 3),
                "full_score": round(float(theirs[i]["score"]), 3),
            }
            for i in ids
        ]
    return made


def _start(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most:]


def _plotly_marker(family: str) -> dict[str, str]:
    marker, line = style.family(family)
    symbols = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
               "X": "x", "*": "star", ".": "circle-dot"}  # fmt: skip
    dashes = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
    return {"symbol": symbols[marker], "dash": dashes[line]}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--out", type=Path, help="the file (default: RESULTS/report.html)")
    parser.add_argument("--wandb", action="store_true", help="a W&B Report as well: its JSON, sent if it can be")
    parser.add_argument("--project", default="kvfrontier", help="of the W&B Report")
    parser.add_argument("--entity", default="", help="of the W&B Report (default: the account's own)")
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
        html = page(results)
    except NothingToRead as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for problem in results.problems:
        print(problem, file=sys.stderr)
    out = given.out or given.results / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html)
    print(f"{len(results.cells)} cells, {out.stat().st_size / 2**20:.1f} MiB: {out}")
    if given.wandb:
        from analysis import wandb_report

        print(wandb_report.make(results, out.with_suffix(".wandb.json"), given.project, given.entity))
    return 0


if __name__ == "__main__":
    sys.exit(main())
