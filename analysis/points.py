"""One row per point of a frontier: a method at a budget on a task, or on one category of it, beside the full cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis import stats
from analysis.load import Results
from analysis.pages.fidelity import with_panels
from analysis.paired import KEYS, WHOLE, Cells, alike, gathered, holm, near_chance, seed_scores, subset_means

#: what the horizontal axis shows, as shares of the full cache's bytes: held when the prompt has ended, read by a decode
#: step, held at the fullest moment
AXES = ("held", "read", "peak")
#: part of a point's bytes that a better one may hold on top and still beat it: less than shares differ by chance
SLACK = 0.02
#: the method whose prompts have no text: what it scores is the floor of a question about one, and no point to choose
FLOOR = "no_context"
TOGETHER = 32  # points whose statistics are computed at once


def points(results: Results, x: str = "held", resamples: int = stats.RESAMPLES) -> pd.DataFrame:
    """All points, task by task; a task's cells without a full cache on the same samples are named in `problems`.

    bits: what a cell that names its bits was given instead of a budget, such as "4 bits", "K4V2" or a table's name.
    share: of the full cache's bytes along `x`, with its mean.  above: samples that held more than their budget.  score,
    full, difference: in the metric's unit, each with its interval (`_low`, `_high`); none (NaN) where it would rest on
    a subset's single sample.  difference is the score less the full cache's, as on screen: where lower is better, above
    0 is worse.  lost, won: samples that flipped.  tie: the interval of the difference holds zero, or there is none, or
    its p after the correction is no sign of one.  p_holm: corrected for the methods compared on the same task; none for
    the full cache.  worst, worst_difference: the subset that lost most.  near_chance: the full cache's score is no more
    than guessing.  at_chance: nor is the point's own.  partial: most of the samples are missing; such a point is on no
    front.  read: share of the bytes that a step reads.  binds: what the budget is for, "held" or "read".  off_axis:
    whether the axis shows nothing of what the method saves, as that of held bytes for a budget of reads; such a point
    is not drawn and on no front.  fidelity: the label of the whole task's fidelity panel, whose numbers stand behind
    it.
    """
    rows: list[dict] = []
    for task in gathered(results, x):
        for group in alike(task.cells):
            for at in range(0, len(group), TOGETHER):
                rows += _rows(task.key, group[at : at + TOGETHER], x, resamples)
    table = pd.DataFrame(rows)
    if len(table):
        others = table[table["method"] != "full"]
        table["p_holm"] = others.groupby([*KEYS, "category"])["p"].transform(lambda p: holm(list(p)))
        table["tie"] |= table["p_holm"] >= stats.SURE
        table = table.sort_values([*KEYS, "label", "budget", "bits"], kind="stable", ignore_index=True)
        table = with_panels(results, table)
    return table


def curves(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The points of every method, smallest share first."""
    for label, group in table.groupby("label", sort=True):
        yield str(label), group.sort_values("share")


def on_front(table: pd.DataFrame, among: str | None = None) -> pd.Series:
    """Which points no other one beats, within their task, protocol, category and `among` (such as family).

    A point beats another with up to SLACK more bytes. What scores no more than guessing, or than slots kept at random
    in no more bytes, is on no front.
    """
    keys = [*KEYS, "category", *([among] if among else [])]
    marks = pd.Series(False, index=table.index)
    left_out = table["simulated"] | table["partial"] | table["at_chance"] | table["off_axis"]
    counted = table[~left_out & ~_at_random(table)]
    counted = counted[counted["method"] != FLOOR]
    for _, group in counted.groupby(keys):
        higher = group["better"].iloc[0] == "higher"
        marks[group.index] = stats.pareto(group["share"].to_numpy(), group["score"].to_numpy(), higher, SLACK)
    return marks


def _at_random(table: pd.DataFrame) -> pd.Series:
    """Which points another method's slots, kept at random in no more bytes, do as well as."""
    marks = pd.Series(False, index=table.index)
    for _, group in table.groupby([*KEYS, "category"]):
        null = group[group["method"] == "random"]
        others = group[~group["method"].isin(["random", "full"])]
        sign = 1 if group["better"].iloc[0] == "higher" else -1
        for index, point in others.iterrows():
            within = null[null["share"] <= point["share"] * (1 + SLACK)]
            marks[index] = bool((sign * within["score"] >= sign * point["score"]).any())
    return marks


def _rows(key: dict[str, str], cells: Sequence[Cells], x: str, resamples: int) -> Iterator[dict]:
    """Points of cells that have the same samples: over the whole task, and by category where there are several."""
    first = cells[0]
    metric, samples = first.first["metric"], first.samples
    scale, sign = metric["scale"], 1.0 if metric["better"] == "higher" else -1.0
    scores = np.stack([one.samples["score"] for one in cells], axis=1)  # [n, k]
    full = samples["full"].to_numpy()[:, None]  # [n, 1]
    gaps, k = scale * (scores - full), len(cells)
    over = first.first["mean_over"]
    seeds = [scale * seed_scores(one.samples) for one in cells]  # each [n, seeds]
    sides = [(str(one.first["method"]), own.shape[1]) for one, own in zip(cells, seeds)]
    columns = np.hstack([*seeds, *(own - scale * full for own in seeds), scale * full])
    means = subset_means(samples, columns, over, resamples=resamples).over_seeds([*sides, *sides, ("full", 1)])
    signed = subset_means(samples, gaps, over, stats.signed, resamples)
    shares, reads, sizes, above = (
        np.stack([one.samples[name] for one in cells], axis=1) for name in ("share", "read", "bytes", "above")
    )
    names = list(dict.fromkeys(means.categories))
    for category in [*([WHOLE] if means.counts.any() else []), *(names if len(names) > 1 else [])]:
        chosen = means.chosen(category)
        weights, here = means.sample_weights(category), chosen[means.place]  # [n]
        averages = stats.exact(means.average(category))
        of_signs = signed.average(category)
        chance = float(scale * weights @ samples["chance"].to_numpy())
        low, high = stats.interval(averages[1:])  # [2k + 1]
        whole = stats.Estimate(averages[0, -1], low[-1], high[-1])
        guessed = near_chance(whole, chance, metric)
        lone = means.rests_on_one(category)
        for i, one in enumerate(cells):
            gap = stats.Estimate(averages[0, k + i], low[k + i], high[k + i])
            kept = stats.retained(averages[:, i], averages[:, -1]) if sign > 0 else None
            flips = stats.flips(scores[here, i], full[here, 0]) if sign > 0 else (0, 0, np.nan)
            by_subset = means.values[0, chosen, k + i]
            worst = (sign * by_subset).argmin()
            yield {
                **key,
                "category": category,
                "label": one.first["label"],
                "method": one.first["method"],
                "family": one.first["family"],
                "simulated": bool(one.first["simulated"]),
                "binds": one.first["binds"],
                "off_axis": x == "held" and one.first["binds"] == "read",
                "budget": one.first["budget"],
                "bits": one.first["bits"],
                "seeds": one.seeds,
                "cells": one.names,
                "full_cells": one.full,
                "better": metric["better"],
                "unit": metric["unit"],
                "metric": metric["name"],
                "digits": metric["digits"],
                "n": int(here.sum()),
                "share": float(weights @ shares[:, i]),
                "read": float(weights @ reads[:, i]),
                "bytes": float(weights @ sizes[:, i]),
                "above": int(np.ceil(above[here, i].sum())),
                "score": averages[0, i],
                "score_low": np.nan if lone else low[i],
                "score_high": np.nan if lone else high[i],
                "full": whole.value,
                "full_low": np.nan if lone else whole.low,
                "full_high": np.nan if lone else whole.high,
                "difference": gap.value,
                "difference_low": np.nan if lone else gap.low,
                "difference_high": np.nan if lone else gap.high,
                "tie": lone or gap.is_tie,
                "retained": kept.value if kept else np.nan,
                "retained_low": kept.low if kept and not lone else np.nan,
                "retained_high": kept.high if kept and not lone else np.nan,
                **dict(zip(("lost", "won", "p_flips"), flips)),
                "p": stats.p_value(of_signs[:, i], weights * gaps[:, i]),
                "worst": means.subsets[chosen][worst],
                "worst_difference": float(by_subset[worst]),
                "near_chance": guessed,
                "at_chance": near_chance(stats.Estimate(averages[0, i], low[i], high[i]), chance, metric),
                "partial": one.partial,
            }
