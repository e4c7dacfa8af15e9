"""The area under a frontier: one number per method and task, with its interval."""

import numpy as np
import pandas as pd

from analysis import stats
from analysis.load import Results
from analysis.paired import KEYS, WHOLE, gathered, seed_scores, subset_means
from analysis.points import FLOOR

SMALLEST = 0.01  # share of the bytes: below that none counts


def areas(results: Results, table: pd.DataFrame, x: str = "held", low: float | None = None) -> pd.DataFrame:
    """Per curve, the mean best score over shares from `low` (the smallest one measured on the task) to 1.

    table: the points of the same results along `x`. In the metric's unit, with the interval of a bootstrap over the
    samples that all cells of the curve have (none, NaN, where it would rest on a subset's single sample); shares are
    taken as measured. Simulated savings, points of few samples, budgets that the axis shows nothing of, the full cache
    itself, tasks near chance and tasks none of whose points is smaller than the full cache have none.
    """
    counted = (table["category"] == WHOLE) & ~table["method"].isin(["full", FLOOR])
    left_out = table["near_chance"] | table["simulated"] | table["partial"] | table["off_axis"]
    groups = dict(list(table[counted & ~left_out].groupby(KEYS)))
    rows = []
    for task in gathered(results, x):
        group = groups.get(tuple(task.key.values()))
        if group is None:
            continue
        start = low or max(SMALLEST, float(group["share"].min()))
        if start >= 1:
            continue
        higher = group["better"].iloc[0] == "higher"
        for label in sorted(set(group["label"])):
            cells = [one for one in task.cells if one.first["label"] == label and not one.partial]
            ids = cells[0].samples.index
            for one in cells[1:]:
                ids = ids.intersection(one.samples.index)
            if ids.empty:
                continue
            parts = [one.samples.loc[ids] for one in cells]
            first = cells[0].first
            scores = [first["metric"]["scale"] * seed_scores(part) for part in parts]  # each [n, seeds]
            sides = [(str(first["method"]), own.shape[1]) for own in scores] + [("", 1)] * len(parts)
            shares = np.stack([part["share"] for part in parts], axis=1)  # [n, k]
            means = subset_means(parts[0], np.hstack([*scores, shares]), first["mean_over"])
            both = means.over_seeds(sides).average()  # [1 + R, 2k]
            area = stats.area(both[0, len(cells) :], both[:, : len(cells)], start, higher)  # [1 + R]
            value, lone = stats.estimate(area), means.rests_on_one()
            rows.append(
                {
                    **task.key,
                    "method": label,
                    "family": first["family"],
                    "from": start,
                    "points": len(cells),
                    "n": len(ids),
                    "area": value.value,
                    "area_low": np.nan if lone else value.low,
                    "area_high": np.nan if lone else value.high,
                    "unit": group["unit"].iloc[0],
                    "digits": group["digits"].iloc[0],
                }
            )
    return pd.DataFrame(rows)
