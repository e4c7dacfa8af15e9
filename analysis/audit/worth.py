"""What scores, pins, allocation and seeing the question are worth: paired differences of a frame's cells.

All differences of a frame come from one bootstrap over its samples, so that they add up: own with pins less random
without is the worth of the pins plus W. Seeds are averaged in a sample first, which takes them as given; their spread
stands beside it. Above 0 is better, also where a lower score is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.audit.frames import Frame
from analysis.frontier import brackets
from analysis.paired import Means, beside, holm, subset_means
from analysis.records import PROTOCOLS

#: bytes of the two sides may differ by so much: a side array, the free places of a page
APART = 0.05
FULL = ("full", "")


class Draws:
    """Means of a frame's columns, the mean itself and resampled ones, all with the same draws."""

    def __init__(self, frame: Frame, samples: pd.DataFrame, columns: dict[Any, np.ndarray]):
        self.samples, self.scale = samples, frame.metric["scale"]
        self.better = 1 if frame.metric["better"] == "higher" else -1
        self.values = {name: self.scale * column for name, column in columns.items()}
        self.over = frame.over
        self.means: Means = subset_means(samples, np.stack(list(self.values.values()), axis=1), frame.over)
        self.columns = dict(zip(self.values, self.means.average().T))  # each [1 + R]

    def __contains__(self, name: Any) -> bool:
        return name in self.columns

    def less(self, a: Any, b: Any) -> np.ndarray:
        """What a is better by than b, [1 + R]."""
        return self.better * (self.columns[a] - self.columns[b])

    def p(self, a: Any, b: Any) -> float:
        """Of no difference between a and b, by random signs."""
        parts = (self.values[a] - self.values[b])[:, None]
        signed = subset_means(self.samples, parts, self.over, stats.signed).average()[:, 0]
        return stats.p_value(signed, self.means.sample_weights() * parts[:, 0])


def draws_of(frame: Frame) -> Draws:
    """Everything that the frame has, and the full cache where it is there."""
    columns: dict[Any, np.ndarray] = {group: found.mean(1) for group, found in frame.scores.items()}
    if frame.full is not None:
        columns[FULL] = frame.full
    return Draws(frame, frame.samples, columns)


def table(found: Sequence[Frame]) -> pd.DataFrame:
    """One row per method, budget and pin with a random null: W with its verdict, and what stands beside it.

    p after Holm's correction for all methods, budgets and pins of one task.
    """
    rows = [row for frame in found for row in _rows(frame)]
    whole = pd.DataFrame(rows)
    if whole.empty:
        return whole
    corrected = whole.groupby(["model", "task", "protocol"], sort=False)["p"].transform(lambda p: holm(list(p)))
    return whole.assign(p=corrected, p_text=[stats.p_text(one) for one in corrected])


def verdict(worth: stats.Estimate) -> str:
    """Whether an interval lies above chance, at it, or below."""
    return "chance" if worth.is_tie else "above chance" if worth.value > 0 else "below chance"


def _rows(frame: Frame) -> list[dict[str, Any]]:
    draws, digits = draws_of(frame), frame.metric["digits"]
    lone = draws.means.rests_on_one()

    def said(worth: np.ndarray | None) -> str:
        if worth is None:
            return ""
        one = stats.estimate(worth)
        return f"{one.value:+.{digits}f} " + ("[-]" if lone else brackets(one.low, one.high, digits))

    def less(a: Any, b: Any) -> np.ndarray | None:
        return draws.less(a, b) if a in draws and b in draws else None

    rows = []
    for pin in frame.pins:
        own, random, counts = ("own", pin), ("random", pin), ("random_in_counts", pin)
        if random not in draws:
            continue
        worth = stats.estimate(draws.less(own, random))
        apart = frame.held[own] / frame.held[random] - 1
        gap = None
        if FULL in draws and not stats.estimate(draws.less(FULL, random)).is_tie:
            gap = worth.value / draws.less(FULL, random)[0]
        seeds = frame.scores[random]
        weights = draws.means.sample_weights()
        by_seed = weights @ seeds * draws.scale
        rows.append({
            **frame.key, "protocol": PROTOCOLS.get(frame.key["protocol"], frame.key["protocol"]),
            "method": frame.method, "budget": frame.budget, "pin": pin, "n": len(frame.samples), "digits": digits,
            "score": draws.columns[own][0], "random": draws.columns[random][0],
            "W": worth.value, "low": worth.low, "high": worth.high, "W_text": said(draws.less(own, random)),
            "verdict": f"void: {apart:+.0%} bytes" if abs(apart) > APART else "-" if lone else verdict(worth),
            "p": draws.p(own, random), "smallest": (worth.high - worth.low) / 2,
            "smallest_text": "-" if lone else f"{(worth.high - worth.low) / 2:.{digits}f}",
            "recency_text": said(less(own, ("recency", pin))),
            "gap": gap, "gap_text": "" if gap is None else f"{gap:.0%}",
            "pin_text": said(less(("random", pin), ("random", "none"))) if pin != "none" else "",
            "interaction_text": said(_interaction(draws, pin)),
            "allocation_text": said(less(counts, random)), "selection_text": said(less(own, counts)),
            "seeds": seeds.shape[1], "spread": float(by_seed.std(ddof=1)) if seeds.shape[1] > 1 else 0.0,
            "draw": frame.draw, "above": frame.above, "bytes_apart": apart,
        })  # fmt: skip
    return rows


def _interaction(draws: Draws, pin: str) -> np.ndarray | None:
    """W under these pins less W without any, [1 + R]."""
    needed = [("own", pin), ("random", pin), ("own", "none"), ("random", "none")]
    if pin == "none" or any(name not in draws for name in needed):
        return None
    return draws.less(*needed[:2]) - draws.less(*needed[2:])


def others(rows: pd.DataFrame) -> pd.DataFrame:
    """What the pins are worth by themselves, and how much more or less the score is with them, as texts."""
    pinned = rows[(rows["pin_text"] != "") | (rows["interaction_text"] != "")]
    names = {"method": "method", "pin": "pin", "pin_text": "P: pins, random", "interaction_text": "W less W unpinned"}
    told = pinned[list(names)].rename(columns=names)
    told.insert(1, "budget", [f"{budget:g}" for budget in pinned["budget"]])
    return told


def visibility(found: Sequence[Frame]) -> pd.DataFrame:
    """What each cell gains where the question is inside the compressed prompt, and the same net of random's gain."""
    aware = {_place(one): one for one in found if one.key["protocol"] == "aware"}
    rows = []
    for one in found:
        other = aware.get(_place(one))
        if one.key["protocol"] != "agnostic" or other is None:
            continue
        samples, _ = beside(other.samples, one.samples[["key", "end"]])
        if samples.empty:
            continue
        columns = {
            (side, *group): frame.scores[group].mean(1)[frame.samples.index.get_indexer(samples.index)]
            for side, frame in (("aware", other), ("agnostic", one))
            for group in frame.scores
        }
        draws, digits = Draws(one, samples, columns), one.metric["digits"]
        for by, pin in sorted(set(one.scores) & set(other.scores)):
            seen = draws.less(("aware", by, pin), ("agnostic", by, pin))
            null = [(side, "random", "boundary") for side in ("aware", "agnostic")]
            net = seen - draws.less(*null) if all(name in draws for name in null) else None
            rows.append({
                "method": one.method, "budget": f"{one.budget:g}", "ranked by": by, "pin": pin, "n": str(len(samples)),
                "seen": _text(seen, digits), "net of random": "" if net is None else _text(net, digits),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _place(frame: Frame) -> tuple[str, str, str, float]:
    return frame.key["model"], frame.key["task"], frame.method, frame.budget


def _text(worth: np.ndarray, digits: int) -> str:
    one = stats.estimate(worth)
    return f"{one.value:+.{digits}f} {brackets(one.low, one.high, digits)}"
