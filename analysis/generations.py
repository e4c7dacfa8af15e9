"""Records of one cell by several codes or model files: the newest is drawn, the others are named.

docs/records.md says what a generation is.
"""

import json
from typing import Any

import pandas as pd

from analysis.names import told_apart

SHOWN = 6  # records that are named in a line
FOR_CHOOSING = ["ask", "where", "place", "began", "age", "answered", "data", "format"]


def asked(identity: dict[str, Any]) -> str:
    """What of a record's identity was asked for, as one text, all but the task's settings and data.

    Format 1 also says there by which weights it was answered.
    """
    model = {key: value for key, value in identity["model"].items() if key != "weights"}
    task = {key: value for key, value in identity["task"].items() if key not in ("fingerprint", "data")}
    return json.dumps({**identity, "model": model, "task": task}, sort_keys=True)


def chosen(cells: pd.DataFrame, every: bool) -> tuple[pd.DataFrame, str]:
    """The cells to draw, their models and tasks told apart; and a line that names those left out, or nothing.

    every: none is left out. Of cells that differ in their code only, the older ones' method has the code in its name.
    """
    cells = _as_now(cells)
    location = _filled(cells, "place")
    cells = cells.assign(files=_filled(cells, "files"), where=location.where(location != "", cells["weights"]))
    cells["ask"] += cells["fingerprint"]
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


def _finished(cells: pd.DataFrame) -> pd.DataFrame:
    return told_apart(cells.drop(columns=FOR_CHOOSING))


def _as_now(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with their data's name among the task's settings.

    A record of format 1 has a hash of all its samples there, and no name: if it says all that a newer record of a task
    says, it is of that one.
    """
    fingerprints = {}
    for _, group in cells.groupby(["model", "task"]):
        settings = {cell: json.loads(text) for cell, text in group["fingerprint"].items()}
        newer = [(settings[cell], data) for cell, data in group.loc[group["format"] > 1, "data"].items()]
        for cell, asked in settings.items():
            data = group.at[cell, "data"]
            if group.at[cell, "format"] == 1:
                asked, data = next((new for new in newer if new[0].items() <= asked.items()), (asked, data))
            fingerprints[cell] = json.dumps({**asked, **({"data": data} if data else {})}, sort_keys=True)
    return cells.assign(fingerprint=pd.Series(fingerprints))


def _filled(cells: pd.DataFrame, column: str) -> pd.Series:
    """A column; a record of format 1, which lacks it, has that of the others with its weights, where they are alike."""
    filled = cells[column].copy()
    for _, values in filled.groupby([cells["model"], cells["weights"]]):
        known = set(values) - {""}
        if len(known) == 1:
            filled[values.index] = known.pop()
    return filled


def _named(cells: list[str]) -> str:
    if not cells:
        return ""
    more = f" and {len(cells) - SHOWN} more" if len(cells) > SHOWN else ""
    said = ", ".join(sorted(cells)[:SHOWN])
    return f"older than the code or files of others, left out: {said}{more}; --all-generations shows them"
