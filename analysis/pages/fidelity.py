"""The fidelity panels of a table's points, and their figure: KL per token against the bytes held."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats, style
from analysis.fidelity.panel import FAULTS, LABELS, Panel, panel, sample_of
from analysis.load import Results
from analysis.paired import WHOLE

#: columns of a point: its label and the numbers behind it; empty, or none, where a record keeps no ids of answers
NUMBERS = (
    "kl", "kl_low", "kl_high", "kl_solved", "kl_max", "kl_most", "kl_q99", "agree", "agree_low", "agree_high",
    "clear_flips", "dnll", "shared_prefix", "identical", "divergence", "out_ratio", "out_ratio_low", "out_ratio_high",
    *(f"excess_{name}" for name in FAULTS), *(f"{name}_full" for name in FAULTS), "n_forced", "n_free", "full_cut",
    "parted_elsewhere",
)  # fmt: skip
#: mean KL of weights of one 8B model at so many bits, on running text, by public logs: grey lines for the scale
ANCHORS = {"8 bit": 0.0002, "5 bit": 0.0047, "3 bit": 0.051, "small 3 bit": 0.164}


def with_panels(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    """The points with the columns `fidelity` (a label) and NUMBERS, of whole tasks.

    Of several seeds the one with the most harmful label counts.
    """
    rows = [
        _of_point(results, point) if point["category"] == WHOLE and point["method"] != "full" else _none()
        for _, point in table.iterrows()
    ]
    return pd.concat([table, pd.DataFrame(rows, index=table.index)], axis=1)


def _none() -> dict[str, Any]:
    return {"fidelity": "", **dict.fromkeys(NUMBERS, np.nan)}


def _of_point(results: Results, point: pd.Series) -> dict[str, Any]:
    seeds = [_of_cell(results, cell, point) for cell in point["cells"]]
    found = [one for one in seeds if one is not None]
    if not found:
        return _none()
    return _columns(min(found, key=lambda one: LABELS.index(one.label) if one.label else len(LABELS)))


def _of_cell(results: Results, cell: str, point: pd.Series) -> Panel | None:
    ours = results.by_cell.get(cell)
    theirs = next((results.by_cell[one] for one in point["full_cells"] if one in results.by_cell), None)
    if ours is None or theirs is None or not (ours["said"] != "").any():
        return None
    both = ours.join(theirs[["said", "score", "key"]], how="inner", rsuffix=" full")
    both = both[(both["said"] != "") & (both["said full"] != "") & (both["key"] == both["key full"])]
    if point["metric"] and "measure" in both and both["measure"].nunique() > 1:
        both = both[~both.index.duplicated()]
    higher = point["better"] == "higher"
    samples = [
        sample_of(
            str(id), stats.stratum(row["category"], row["subset"]), json.loads(row["said"]),
            json.loads(row["said full"]), higher and row["score full"] >= stats.RIGHT,
        )
        for id, row in both.iterrows()
    ]  # fmt: skip
    reads_less = point["binds"] == "read" and point["read"] < 1
    less = bool(point["budget"] < 1 or (both["bytes"] < both["bytes_full"]).any() or reads_less)
    return panel([one for one in samples if one is not None], less)


def _columns(one: Panel) -> dict[str, Any]:
    numbers: dict[str, float | None] = {
        name: getattr(one, name) for name in ("kl_solved", "kl_max", "kl_most", "kl_q99", "clear_flips", "divergence")
    }
    for name in ("kl", "agree", "dnll", "shared_prefix", "identical", "out_ratio"):
        found = getattr(one, name)
        for end, what in (("", "value"), ("_low", "low"), ("_high", "high")):
            numbers[name + end] = None if found is None else getattr(found, what)
    for name, fault in one.faults.items():
        numbers |= {f"excess_{name}": fault.excess.value, f"{name}_full": fault.full}
    numbers |= {"n_forced": one.n_forced, "n_free": one.n, "full_cut": one.cut, "parted_elsewhere": one.apart}
    return {"fidelity": one.label, **{name: np.nan if numbers[name] is None else numbers[name] for name in NUMBERS}}


def has_panels(table: pd.DataFrame) -> bool:
    """Whether any point has a panel."""
    return "n_free" in table and bool(table["n_free"].notna().any())


def draw(table: pd.DataFrame, x: str, name: str) -> Any:
    """A matplotlib figure with one panel per model, task and protocol; None where no point was forced.

    x: the column of the horizontal axis, called `name` on it.
    """
    import matplotlib.pyplot as plt

    forced = table[(table["category"] == WHOLE) & table["kl"].notna()]
    panels = list(forced.groupby(["model", "task", "protocol"], sort=True))
    if not panels:
        return None
    looks = style.looks(forced.groupby("label")["family"].first().to_dict())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with plt.rc_context(style.RC):
        size = (style.COLUMN * columns, 2.4 * lines + 0.4)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, ((model, task, protocol), group) in zip(axes.flat, panels):
            _panel(axis, group, x, looks)
            axis.set_title(f"{task} ({protocol})" + (f"\n{model}" if table["model"].nunique() > 1 else ""))
            axis.set_xlabel(name)
            axis.set_ylabel("KL(full || method), nats per token")
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panel(axis: Any, group: pd.DataFrame, x: str, looks: dict[str, style.Look]) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_yscale("log")
    for name, kl in ANCHORS.items():
        axis.axhline(kl, color="#b0b0b0", lw=0.6, zorder=0)
        axis.annotate(name, (1.0, kl), xycoords=("axes fraction", "data"), fontsize=5, color="#808080", va="bottom",
                      ha="right")  # fmt: skip
    for label, line in group.groupby("label", sort=True):
        line = line.sort_values(x)
        # what is exactly 0 cannot be drawn on this axis, and the table has its label
        drawn = line[line["kl"] > 0]
        look = style.line(looks[str(label)], bool(line["simulated"].iloc[0]))
        axis.plot(drawn[x], drawn["kl"], **look, label=str(label))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_minor_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.25, lw=0.4)
