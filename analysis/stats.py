"""Paired statistics of cells against the full cache, on the same samples.

A score is the mean over categories of the mean over subsets of the mean over samples: a weighted sum with one weight
per sample. All intervals are percentile intervals of a bootstrap that draws samples inside each subset, with the same
draws for every cell that has the same samples, so that differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

RESAMPLES = 2000
LEVEL = 0.95
RIGHT = 0.5  # a sample's score from which on it counts as solved, for flips


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval holds zero: for differences."""
        return self.low <= 0 <= self.high


def weights(subsets: Sequence[str], categories: Sequence[str]) -> np.ndarray:
    """Each sample's share in the score, [n]; they add up to 1."""
    frame = pd.DataFrame({"subset": list(subsets), "category": list(categories)})
    in_subset = frame.groupby(["category", "subset"])["subset"].transform("size")
    subsets_in_category = frame.groupby("category")["subset"].transform("nunique")
    return (1.0 / (in_subset * subsets_in_category * frame["category"].nunique())).to_numpy()


def draws(subsets: Sequence[str], categories: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights of `resamples` bootstrap samples, [resamples, n]: a sample drawn twice counts twice in its subset."""
    own = weights(subsets, categories)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(own)))
    for rows in pd.DataFrame({"s": list(subsets), "c": list(categories)}).groupby(["c", "s"]).indices.values():
        n = len(rows)
        drawn[:, rows] = rng.multinomial(n, np.full(n, 1 / n), size=resamples) * own[rows]
    return drawn


def estimate(values: np.ndarray, own: np.ndarray, drawn: np.ndarray, level: float = LEVEL) -> Estimate:
    """The weighted sum of per-sample values [n] with its interval; own [n] and drawn [R, n] as from the above."""
    low, high = interval(drawn @ values, level)
    return Estimate(float(own @ values), low, high)


def interval(resampled: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of resampled values [R]."""
    low, high = np.percentile(resampled, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def retained(ours: np.ndarray, full: np.ndarray, own: np.ndarray, drawn: np.ndarray) -> Estimate | None:
    """The share of the full cache's score that is left; None where the full cache scores nothing."""
    whole = float(own @ full)
    if whole <= 0:
        return None
    below = drawn @ full
    low, high = interval((drawn @ ours)[below > 0] / below[below > 0])
    return Estimate(float(own @ ours) / whole, low, high)


def flips(ours: np.ndarray, full: np.ndarray) -> tuple[int, int, float]:
    """Samples lost and samples won against the full cache, and the exact two-sided McNemar p-value."""
    from scipy.stats import binomtest

    lost, won = int(((full >= RIGHT) & (ours < RIGHT)).sum()), int(((full < RIGHT) & (ours >= RIGHT)).sum())
    return lost, won, float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def p_value(difference: np.ndarray, own: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of "no difference": how often random signs of the paired differences [n] give as large a sum."""
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, len(difference)))
    parts = own * difference
    at_least = np.abs(signs @ parts) >= abs(parts.sum()) - 1e-12
    return float((1 + at_least.sum()) / (1 + resamples))


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for as many comparisons, in the given order."""
    order = np.argsort(p)
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(x) for x in corrected]


def area(share: np.ndarray, score: np.ndarray, low: float, higher: bool = True) -> float:
    """Mean best score over the shares from `low` to 1, shares on a logarithmic axis.

    share [k], score [k]: the points of one curve. Between points the best score of what fits counts (a step, because
    only cells that were run exist); below the smallest point its score counts as 0, or as the worst one where lower is
    better.
    """
    order = np.argsort(share)
    share, score = np.clip(share[order], low, 1.0), score[order]
    best = np.maximum.accumulate(score) if higher else np.minimum.accumulate(score)
    floor = 0.0 if higher else float(score.max())
    edges = np.log(np.concatenate(([low], share, [1.0])))
    return float(np.diff(edges) @ np.concatenate(([floor], best)) / -np.log(low))


def pareto(share: np.ndarray, score: np.ndarray, higher: bool = True) -> np.ndarray:
    """Which points [k] no other beats: none has a better score at no more share, or less share at no worse score."""
    score = score if higher else -score
    on = np.ones(len(share), dtype=bool)
    for i in range(len(share)):
        no_worse = (share <= share[i]) & (score >= score[i])
        on[i] = not (no_worse & ((share < share[i]) | (score > score[i]))).any()
    return on
