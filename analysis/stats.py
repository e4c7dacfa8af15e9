"""The one bootstrap: paired statistics of samples, for runs and analyses alike; numpy and the standard library only.

A row of a table is a weighted mean of samples. All intervals are percentile intervals of a bootstrap that draws samples
with replacement inside each stratum (a subset of a category), with the same draws for every row and every cell that has
the same samples there, so that differences are paired. What is drawn depends on the stratum's name, on its samples' ids
and on the seed, and not on the order in which samples come.
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
FEW = 12  # paired differences of which all signs are tried
EXACT = 10  # decimals of a mean that the order of its sum leaves alone


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
    names, category_of, size = np.unique(np.asarray(categories), return_inverse=True, return_counts=True)
    return 1 / (size[category_of] * len(names))


def stratum(category: str, subset: str) -> str:
    """The name by which samples are drawn together."""
    return f"{category}/{subset}"


def bootstrap(
    values: np.ndarray, weights: np.ndarray, ids: Sequence[str], key: str, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Weighted means of one stratum's samples, [1 + resamples, k]: the mean itself, then of as many drawn with
    replacement.

    values [n, k], weights [n], ids [n], all different.  key: the stratum's name; the same name, n and seed give the
    same draws of the samples in the order of their ids.
    """
    order = _order(ids)
    values, weights = values[order], weights[order]
    means = [(weights @ values / weights.sum())[None]]
    for counts in _counts(len(values), key, resamples, seed):  # [r, n]
        drawn_weights = counts * weights
        means.append(drawn_weights @ values / drawn_weights.sum(axis=1, keepdims=True))
    return np.concatenate(means)


def _order(ids: Sequence[str]) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: ids[i])


def _counts(n: int, key: str, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, zlib.crc32(key.encode("utf-8", "replace"))])
    step = max(1, ROOM // n)
    for at in range(0, resamples, step):
        rows = min(step, resamples - at)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def row(
    values: np.ndarray,
    weights: np.ndarray,
    ids: Sequence[str],
    strata: Sequence[str],
    parts: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """A row of a table, [1 + resamples, k]: the weighted mean of values [n, k], then with samples drawn anew.

    weights [n]: what each sample counts in the row; 0 leaves it out, also of what is drawn.  strata [n]: what each
    sample is drawn from.  parts [n]: which mean inside its stratum it counts in, where a sample has several scores, one
    each; a stratum's samples are then drawn for all of its parts at once.
    """  # fmt: skip
    groups: dict[tuple[str, str], list[int]] = {}
    for i in np.flatnonzero(weights).tolist():
        groups.setdefault((strata[i], parts[i] if parts else ""), []).append(i)
    total = np.zeros((1 + resamples, values.shape[1]))
    for (key, _), indices in groups.items():
        inside = weights[indices]
        total += inside.sum() * bootstrap(values[indices], inside, [ids[i] for i in indices], key, resamples, seed)
    return total


def rests_on_one(weights: np.ndarray, strata: Sequence[str]) -> bool:
    """Whether some stratum has a single sample that counts, so that nothing is known of how its samples differ."""
    counted = np.asarray(strata)[np.flatnonzero(weights)]
    return len(counted) == 0 or bool((np.unique(counted, return_counts=True)[1] < 2).any())


def seed_weights(seeds: int, key: str, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """What each of a method's seeds counts in its mean, [1 + resamples, seeds]: all alike, then of as many drawn with
    replacement; key as in `bootstrap`, the method's name for instance.
    """
    rng = np.random.default_rng([seed, zlib.crc32(key.encode()), 2])
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    return np.concatenate([np.full((1, seeds), 1 / seeds), drawn])


def signed(
    differences: np.ndarray,
    weights: np.ndarray,
    ids: Sequence[str],
    key: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Weighted means of one stratum's paired differences, [1 + resamples, k]: itself, then with random signs.

    differences [n, k]; weights, ids and key as in `bootstrap`.
    """  # fmt: skip
    parts = (weights[:, None] * differences / weights.sum())[_order(ids)]
    rng = np.random.default_rng([seed, zlib.crc32(key.encode("utf-8", "replace")), 1])
    sums, step = [parts.sum(axis=0)[None]], max(1, ROOM // len(parts))
    for at in range(0, resamples, step):
        signs = rng.integers(2, size=(min(step, resamples - at), len(parts)), dtype=np.int8)
        sums.append((2.0 * signs - 1.0) @ parts)
    return np.concatenate(sums)


def exact(value: np.ndarray) -> np.ndarray:
    """Means to the last decimal that does not depend on the order in which their sums were taken."""
    return np.round(value, EXACT) + 0.0  # no -0.0


def interval(resampled: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the middle `level` of resampled values [R, ...], each [...]."""
    low, high = np.percentile(exact(resampled), [50 * (1 - level), 50 * (1 + level)], axis=0)
    return exact(low), exact(high)


def estimate(resampled: np.ndarray, level: float = LEVEL) -> Estimate:
    """A value with its interval, from [1 + R]: the value itself, then resampled ones."""
    low, high = interval(resampled[1:], level)
    return Estimate(float(exact(resampled[0])), float(low), float(high))


def retained(ours: np.ndarray, full: np.ndarray) -> Estimate | None:
    """The share of the full cache's score that is left, from two [1 + R]; None where the full cache scores nothing."""
    if full[0] <= 0:
        return None
    some = full > 0
    return estimate(ours[some] / full[some])


def flips(ours: np.ndarray, full: np.ndarray) -> tuple[int, int, float]:
    """Samples lost and samples won against the full cache, and the exact two-sided McNemar p-value."""
    lost, won = int(((full >= RIGHT) & (ours < RIGHT)).sum()), int(((full < RIGHT) & (ours >= RIGHT)).sum())
    tail = term = 1  # of the binomial coefficients up to the smaller count
    for k in range(min(lost, won)):
        term = term * (lost + won - k) // (k + 1)
        tail += term
    return lost, won, min(1.0, 2 * tail / 2 ** (lost + won))


def p_value(signed: np.ndarray, parts: np.ndarray) -> float:
    """Two-sided p of "no difference", from [1 + R]: the difference, then with random signs.

    How often random signs of the paired differences give as large a sum. parts [n]: the differences' parts in the sum;
    of a few all signs are tried. Hoeffding's bound, 2 exp(-d^2 / 2 sum(parts^2)), takes over where it is smaller than
    the signs drawn can say.
    """
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0
    if len(parts) <= FEW:
        signs = 1 - 2 * (np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1)  # [2**n, n]
        return float((np.abs(signs @ parts) >= abs(parts.sum()) - 1e-12).mean())
    at_least = np.abs(signed[1:]) >= abs(signed[0]) - 1e-12
    drawn = (1 + int(at_least.sum())) / len(signed)
    return float(min(1.0, drawn, 2 * np.exp(-(signed[0] ** 2) / (2 * (parts**2).sum()))))


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
