"""Paired statistics of cells against the full cache, on the same samples.

A score is a mean of subset means: over all subsets, or over the categories' means of theirs. Inside a subset samples
count by their weight, such as a text's tokens. All intervals are percentile intervals of a bootstrap that draws samples
inside each subset, with the same draws for every cell that has the same samples, so that differences are paired.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SURE = 0.05  # p below which a difference is more than noise
RIGHT = 0.5  # a sample's score from which on it counts as solved, for flips
ROOM = 2**22  # numbers that are drawn at once


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


def subset_weights(categories: Sequence[str], over: str = "categories") -> np.ndarray:
    """Each subset's share in the average, [subsets], from their categories: of category means, or of `subsets`."""
    if over == "subsets":
        return np.full(len(categories), 1 / len(categories))
    names, place, size = np.unique(np.asarray(categories), return_inverse=True, return_counts=True)
    return 1 / (size[place] * len(names))


def bootstrap(
    values: np.ndarray, weights: np.ndarray, key: str, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Weighted means of one subset's samples, [1 + resamples, k]: the mean itself, then of as many drawn with
    replacement.

    values [n, k], weights [n]. key: the subset's name; the same name, n and seed give the same draws.
    """
    found = [(weights @ values / weights.sum())[None]]
    for counts in _counts(len(values), key, resamples, seed):  # [r, n]
        own = counts * weights
        found.append(own @ values / own.sum(axis=1, keepdims=True))
    return np.concatenate(found)


def _counts(n: int, key: str, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    step = max(1, ROOM // n)
    for at in range(0, resamples, step):
        rows = min(step, resamples - at)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def seed_weights(seeds: int, key: str, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """What each of a method's seeds counts in its mean, [1 + resamples, seeds]: all alike, then of as many drawn with
    replacement; key as in `bootstrap`, the method's name for instance.
    """
    rng = np.random.default_rng([seed, zlib.crc32(key.encode()), 2])
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    return np.concatenate([np.full((1, seeds), 1 / seeds), drawn])


def signed(
    differences: np.ndarray, weights: np.ndarray, key: str, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Weighted means of one subset's paired differences, [1 + resamples, k]: itself, then with random signs.

    differences [n, k], weights [n]; key as in `bootstrap`.
    """
    parts = weights[:, None] * differences / weights.sum()
    rng = np.random.default_rng([seed, zlib.crc32(key.encode()), 1])
    found, step = [parts.sum(axis=0)[None]], max(1, ROOM // len(parts))
    for at in range(0, resamples, step):
        signs = rng.integers(2, size=(min(step, resamples - at), len(parts)), dtype=np.int8)
        found.append((2.0 * signs - 1.0) @ parts)
    return np.concatenate(found)


def interval(resampled: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the middle `level` of resampled values [R, ...], each [...]."""
    low, high = np.percentile(resampled, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return low, high


def estimate(resampled: np.ndarray, level: float = LEVEL) -> Estimate:
    """A value with its interval, from [1 + R]: the value itself, then resampled ones."""
    low, high = interval(resampled[1:], level)
    return Estimate(float(resampled[0]), float(low), float(high))


def retained(ours: np.ndarray, full: np.ndarray) -> Estimate | None:
    """The share of the full cache's score that is left, from two [1 + R]; None where the full cache scores nothing."""
    if full[0] <= 0:
        return None
    some = full > 0
    return estimate(ours[some] / full[some])


def flips(ours: np.ndarray, full: np.ndarray) -> tuple[int, int, float]:
    """Samples lost and samples won against the full cache, and the exact two-sided McNemar p-value."""
    from scipy.special import bdtr

    lost, won = int(((full >= RIGHT) & (ours < RIGHT)).sum()), int(((full < RIGHT) & (ours >= RIGHT)).sum())
    return lost, won, min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5)))


def p_value(signed: np.ndarray, squares: float) -> float:
    """Two-sided p of "no difference", from [1 + R]: the difference, then with random signs.

    How often random signs of the paired differences give as large a sum. squares: of the differences' parts in the sum.
    Hoeffding's bound, 2 exp(-d^2 / 2 squares), takes over where it is smaller than the few signs drawn can say.
    """
    if squares == 0:
        return 1.0
    at_least = np.abs(signed[1:]) >= abs(signed[0]) - 1e-12
    drawn = (1 + int(at_least.sum())) / len(signed)
    return float(min(1.0, drawn, 2 * np.exp(-(signed[0] ** 2) / (2 * squares))))


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for as many comparisons, in the given order."""
    order = np.argsort(p)
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(x) for x in corrected]


def area(share: np.ndarray, score: np.ndarray, low: float, higher: bool = True) -> np.ndarray:
    """Mean best score over the shares from `low` to 1, shares on a logarithmic axis; [...].

    share [k], score [..., k]: the points of one curve, and its resamples. Between points the best score of what fits
    counts (a step, because only cells that were run exist); below the smallest point its score counts as 0, or as the
    worst one where lower is better.
    """
    order = np.argsort(share)
    share, score = np.clip(share[order], low, 1.0), score[..., order]
    best = np.maximum.accumulate(score, axis=-1) if higher else np.minimum.accumulate(score, axis=-1)
    floor = np.zeros_like(score[..., :1]) if higher else score.max(axis=-1, keepdims=True)
    edges = np.log(np.concatenate(([low], share, [1.0])))
    return np.concatenate((floor, best), axis=-1) @ np.diff(edges) / -np.log(low)


def p_text(p: float) -> str:
    """A p-value to three decimals; none is 0."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def pareto(share: np.ndarray, score: np.ndarray, higher: bool = True, slack: float = 0.0) -> np.ndarray:
    """Which points [k] no other beats: none has a better score at no more share, or less share at no worse score.

    slack: part of a point's share that a better one may take on top of it.
    """
    score = score if higher else -score
    on = np.ones(len(share), dtype=bool)
    for i in range(len(share)):
        no_worse = (share <= share[i] * (1 + slack)) & (score >= score[i])
        on[i] = not (no_worse & ((share < share[i]) | (score > score[i]))).any()
    return on
