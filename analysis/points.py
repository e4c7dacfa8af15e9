"""One row per point of a frontier: a method at a budget on a task, or on one category of it, beside the full cache."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis import stats
from analysis.load import Results

#: what the horizontal axis shows, as shares of the full cache's bytes: held when the prompt has ended, read by the last
#: decode step, held at the fullest moment
AXES = ("held", "read", "peak")
WHOLE = "all"  # the category of a point over the whole task
NEAR_CHANCE = 5.0  # points of 100: below that a full cache's score says nothing about a method
KEYS = ["model", "task", "protocol", "dtype", "weights"]
#: knobs that are places on one curve, not different curves
ALONG = {"budget", "bits", "key_bits", "value_bits"}


def points(results: Results, x: str = "held", resamples: int = stats.RESAMPLES) -> pd.DataFrame:
    """All points, task by task; a task's cells without a full cache on the same samples are named in `problems`.

    share: of the full cache's bytes along `x`, with its mean.  score, full, difference: in the metric's unit, each with
    its interval (`_low`, `_high`).  difference is above 0 where the method is better.  lost, won: samples that flipped.
    p_holm: corrected for the methods compared on the same task.  worst, worst_difference: the subset that lost most.
    """
    rows: list[dict] = []
    cells = results.cells.assign(label=labels(results.cells))
    for key, group in cells.groupby(KEYS, sort=True, dropna=False):
        rows += _task_points(dict(zip(KEYS, key)), group, results, x, resamples)
    table = pd.DataFrame(rows)
    if len(table):
        table["p_holm"] = table.groupby([*KEYS, "category"], dropna=False)["p"].transform(lambda p: stats.holm(list(p)))
    return table


def labels(cells: pd.DataFrame) -> pd.Series:
    """Each cell's curve: the method's name, and the knobs in which its cells differ where they do."""
    made = {}
    for (method, _), group in cells.groupby(["method", "model"]):
        configs = [_flat(json.loads(c)) for c in group["config"]]
        knobs = {k for c in configs for k in c if k.rpartition(".")[2] not in ALONG}
        varied = sorted(k for k in knobs if len({json.dumps(c.get(k)) for c in configs}) > 1)
        for cell, config in zip(group.index, configs):
            made[cell] = " ".join([method, *(f"{k}={config.get(k)}" for k in varied)])
    return pd.Series(made).reindex(cells.index)


def curves(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The points of every method, smallest share first."""
    for label, group in table.groupby("label", sort=True):
        yield str(label), group.sort_values("share")


def on_front(table: pd.DataFrame, among: str | None = None) -> pd.Series:
    """Which points no other one beats, within their task, protocol, category and `among` (such as family)."""
    keys = [*KEYS, "category", *([among] if among else [])]
    marks = pd.Series(False, index=table.index)
    for _, group in table[~table["simulated"]].groupby(keys, dropna=False):
        higher = group["better"].iloc[0] == "higher"
        marks[group.index] = stats.pareto(group["share"].to_numpy(), group["score"].to_numpy(), higher)
    return marks


def _task_points(key: dict, cells: pd.DataFrame, results: Results, x: str, resamples: int) -> list[dict]:
    problems, columns = results.problems, ("score", x, "bytes")
    where = f"{key['model']}, {key['task']}, {key['protocol']}"
    full_cells = cells[cells["method"] == "full"]
    if full_cells.empty:
        problems.append(f"{where}: no full cache to compare with; {len(cells)} cells left out")
        return []
    metric = cells["metric"].iloc[0]
    full = by_sample(results, full_cells, columns)
    if full.empty:
        problems.append(f"{where}: the full cache has no finished sample; {len(cells)} cells left out")
        return []
    rows = []
    drawn: dict[tuple, np.ndarray] = {}
    for (label, budget), group in cells.groupby(["label", "budget"]):
        ours = by_sample(results, group, columns).rename(columns={x: "share"})
        both = ours.join(full[["score"]].rename(columns={"score": "full"}), how="inner")
        both["mean_over"] = both["category"] if group["mean_over"].iloc[0] == "categories" else WHOLE
        if both.empty:
            problems.append(f"{where}: {label} at budget {budget:g} shares no finished sample with the full cache")
            continue
        categories = list(dict.fromkeys(both["category"]))
        for category in [WHOLE, *(categories if len(categories) > 1 else [])]:
            part = both if category == WHOLE else both[both["category"] == category]
            first = group.iloc[0]
            rows.append(
                {
                    **key,
                    "category": category,
                    "label": label,
                    "method": first["method"],
                    "family": first["family"],
                    "simulated": first["simulated"],
                    "budget": budget,
                    "seeds": group["seed"].nunique(),
                    "cells": list(group["cell"]),
                    "better": metric["better"],
                    "unit": metric["unit"],
                    "metric": metric["name"],
                    "digits": metric["digits"],
                    **_point(part, metric, drawn, resamples),
                }
            )
    return rows


def _point(part: pd.DataFrame, metric: dict, drawn: dict[tuple, np.ndarray], resamples: int) -> dict:
    """Statistics of one cell's samples, which carry `score`, `full` and `mean_over`, the category in the average."""
    own = stats.weights(part["subset"], part["mean_over"])
    key = tuple(part.index)
    if key not in drawn:  # the same draws for all cells that have the same samples
        drawn[key] = stats.draws(part["subset"], part["mean_over"], resamples)
    scale, sign = metric["scale"], 1.0 if metric["better"] == "higher" else -1.0
    ours, full = scale * part["score"].to_numpy(), scale * part["full"].to_numpy()
    score = stats.estimate(ours, own, drawn[key])
    whole = stats.estimate(full, own, drawn[key])
    gain = stats.estimate(sign * (ours - full), own, drawn[key])
    kept = stats.retained(ours, full, own, drawn[key]) if sign > 0 else None
    lost, won, flip_p = stats.flips(part["score"].to_numpy(), part["full"].to_numpy()) if sign > 0 else (0, 0, 1.0)
    by_subset = (sign * scale * (part["score"] - part["full"])).groupby(part["subset"]).mean()
    return {
        "n": len(part),
        "share": float(own @ part["share"].to_numpy()),
        "bytes": float(own @ part["bytes"].to_numpy()),
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
        "full": whole.value,
        "full_low": whole.low,
        "full_high": whole.high,
        "difference": gain.value,
        "difference_low": gain.low,
        "difference_high": gain.high,
        "tie": gain.is_tie,
        "retained": kept.value if kept else np.nan,
        "retained_low": kept.low if kept else np.nan,
        "retained_high": kept.high if kept else np.nan,
        "lost": lost,
        "won": won,
        "p_flips": flip_p,
        "p": stats.p_value(sign * (ours - full), own, resamples),
        "worst": by_subset.idxmin(),
        "worst_difference": float(by_subset.min()),
        "near_chance": bool(sign > 0 and scale == 100 and whole.value < NEAR_CHANCE),
    }


def by_sample(results: Results, cells: pd.DataFrame, columns: Sequence[str] = ("score",)) -> pd.DataFrame:
    """Columns of the finished samples of cells that differ in their seed only, averaged over the seeds; by id.

    Only samples that all of the cells have; with their subset and category.
    """
    own = results.finished[results.finished["cell"].isin(cells["cell"])]
    grouped = own.groupby("id", sort=True)
    table = grouped[list(columns)].mean()
    table[["subset", "category"]] = grouped[["subset", "category"]].first()
    return table[grouped.size() == len(cells)]


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested knobs under dotted names."""
    made = {}
    for name, value in config.items():
        made |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return made
