"""What is kept where? `python -m analysis.heads` draws what methods hold by layer and head, side by side.

For every method that `python run.py runner=heads method=NAME` has looked at: the share of a prompt's tokens that each
KV head holds, policy, bits or rank where a method has them, and the positions that are held of one sample.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import style
from analysis.command import Command
from analysis.files import check_out
from analysis.frontier import show
from analysis.heads.figure import draw
from analysis.heads.layouts import Layout, read_layouts
from analysis.load import NothingToRead

MOST = 4  # layouts beside each other


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("--method", action="append", help="only this method; may be repeated")
    parser.add_argument("--budget", action="append", type=float, help="only at this budget; may be repeated")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")


def run(given: argparse.Namespace) -> int:
    """Read, print and draw, a picture per model, task and protocol. Raises NothingToRead and CannotWrite."""
    check_out(given.out, is_file=False)
    layouts, problems = read_layouts(given.results)
    for problem in problems:
        print(problem, file=sys.stderr)
    asked = {name: getattr(given, name) for name in ("method", "budget", "task", "model")}
    chosen = [one for one in layouts if all(not of or one.about[name] in of for name, of in asked.items())]
    if not chosen:
        there = ", ".join(dict.fromkeys(one.label for one in layouts))
        raise NothingToRead(f"{given.results}: nothing of what was asked for; there is {there}")
    out = given.out or (given.results if given.results.is_dir() else given.results.parent)
    for (model, task, protocol), group in groupby(chosen, key=lambda one: one.place):
        beside = list(group)
        print(f"\n{model}, {task}, {protocol}\n")
        show(table(beside), given.markdown)
        if len(beside) > MOST:
            print(f"{len(beside)} are there, the first {MOST} are drawn; --method and --budget choose")
        name = "-".join(["heads", model, task, protocol])
        style.save(draw(beside[:MOST]), out / name)
        print(f"{out / name}.*")
    return 0


def table(layouts: list[Layout]) -> pd.DataFrame:
    """One row per layout: the share of tokens held, and how far layers and heads are from each other."""
    rows = []
    for one in layouts:
        by_layer = np.nanmean(one.kept[np.isfinite(one.kept).any(1)], axis=1)
        told = {name: _told(values) for name, values in one.traits.items()}
        rows.append({
            "method": one.about["method"], "budget": f"{one.about['budget']:g}", "n": str(len(one.about["samples"])),
            "tokens held": f"{np.nanmean(one.kept):.1%}",
            "by layer": f"{by_layer.min():.1%} to {by_layer.max():.1%}",
            "by head": f"{np.nanmin(one.kept):.1%} to {np.nanmax(one.kept):.1%}", **told,
        })  # fmt: skip
    return pd.DataFrame(rows).fillna("")


def _told(values: np.ndarray) -> str:
    """What there is of a trait, and in how many heads: words or numbers."""
    found = pd.Series(values.ravel()).dropna().value_counts()
    if len(found) == 1:
        return str(found.index[0])
    if all(isinstance(value, int | float) for value in found.index) and len(found) > 4:
        return f"{min(found.index):g} to {max(found.index):g}"
    return ", ".join(f"{value} in {n}" for value, n in found.items())


main = Command(
    "heads", __doc__ or "", run, options, "what runner=heads has written", default=Path("outputs/heads"),
    out="folder of the pictures, heads-MODEL-TASK-PROTOCOL.png and .svg; the folder that is read", markdown=True,
).main  # fmt: skip
