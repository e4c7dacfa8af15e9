"""Records of one cell by several codes or model files: the newest is drawn, the others are named.

docs/records.md says what a generation is.
"""

import argparse
import json
from typing import Any

import pandas as pd

from analysis.names import told_apart

SHOWN = 6  # records that are named in a line
FOR_CHOOSING = ["ask", "where", "place", "began", "age", "answered"]


def asked(identity: dict[str, Any]) -> str:
    """What of a record's identity was asked for, as one text; format 1 also says by which weights it was answered."""
    model = {key: value for key, value in identity["model"].items() if key != "weights"}
    return json.dumps({**identity, "model": model}, sort_keys=True)


def chosen(cells: pd.DataFrame, every: bool) -> tuple[pd.DataFrame, str]:
    """The cells to draw, their models and tasks told apart; and a line that names those left out, or nothing.

    every: none is left out. Of cells that differ in their code only, the older ones' method has the code in its name.
    """
    place = _filled(cells, "place")
    cells = cells.assign(files=_filled(cells, "files"), where=place.where(place != "", cells["weights"]))
    by_age = cells.sort_values("age", kind="stable")
    newest = by_age[by_age["answered"]].groupby(["ask", "where"])["cell"].last()
    kept = cells.merge(newest.rename("newest"), how="left", left_on=["ask", "where"], right_index=True)["newest"]
    kept.index = cells.index
    older = cells[kept.notna() & (kept != cells["cell"])]
    if not every:
        return _finished(cells.drop(index=older.index)), _named(list(older["cell"]))
    alike = by_age.groupby(["ask", "where", "weights", "files"])["cell"].transform("last")
    by_code = cells["cell"] != alike.reindex(cells.index)
    names = cells["method"].where(~by_code, cells["method"] + "@" + cells["code"].str[:6])
    return _finished(cells.assign(method=names)), ""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """`--all-generations`, for a command that loads records."""
    parser.add_argument("--all-generations", action="store_true", help="also what older code and files have recorded")


def _finished(cells: pd.DataFrame) -> pd.DataFrame:
    return told_apart(cells.drop(columns=FOR_CHOOSING))


def _filled(cells: pd.DataFrame, column: str) -> pd.Series:
    """A column; a record of format 1, which lacks it, has that of the others with its weights, where they are alike."""
    filled = cells[column].copy()
    for _, own in filled.groupby([cells["model"], cells["weights"]]):
        known = set(own) - {""}
        if len(known) == 1:
            filled[own.index] = known.pop()
    return filled


def _named(cells: list[str]) -> str:
    if not cells:
        return ""
    more = f" and {len(cells) - SHOWN} more" if len(cells) > SHOWN else ""
    said = ", ".join(sorted(cells)[:SHOWN])
    return f"older than the code or files of others, left out: {said}{more}; --all-generations shows them"
