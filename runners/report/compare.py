"""A method against the full cache on the same samples: the result rows and paired bootstrap intervals."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.base import Example, Row, Task


@dataclass(frozen=True)
class Compared:
    """One row of the result table: the method's row, the full cache's, and the 95 % interval of their difference.

    interval: in the metric's unit, lower and upper; None where a subset has fewer than two samples.
    digits: decimal places of the metric, to which it is shown.
    """

    row: Row
    full: Row
    interval: tuple[float, float] | None
    digits: int = 2

    @property
    def difference(self) -> float | None:
        if self.row.score is None or self.full.score is None:
            return None
        return self.row.score - self.full.score


def compare(
    task: Task,
    samples: Sequence[tuple[Example, float, float]],
    resamples: int,
    seed: int,
) -> list[Compared]:
    """The task's result rows for samples (example, the method's score, the full cache's score).

    Samples are drawn with replacement inside each subset, in pairs, and averaged as the task averages; the interval is
    the plain percentile one. The same samples give the same intervals. Parts of one sample are drawn together.
    """
    rows = task.summarize([(example, score) for example, score, _ in samples])
    full = {_key(row): row for row in task.summarize([(example, score) for example, _, score in samples])}
    members: dict[tuple[str, str], list[tuple[Example, float]]] = {}
    for example, score, reference in samples:
        for key in dict.fromkeys(task.groups(example)):
            members.setdefault(key, []).append((example, score - reference))
    return [
        Compared(
            row,
            full[_key(row)],
            _interval(task, _key(row), members.get(_key(row), []), resamples, seed),
            task.metric.digits,
        )
        for row in rows
    ]


def _key(row: Row) -> tuple[str, str]:
    """What tells a row from all others: a category may be called like a subset."""
    return row.kind, row.name


def _interval(
    task: Task, key: tuple[str, str], members: Sequence[tuple[Example, float]], resamples: int, seed: int
) -> tuple[float, float] | None:
    subsets: dict[str, list[tuple[Example, float]]] = {}
    for example, difference in members:
        subsets.setdefault(example.tags["subset"], []).append((example, difference))
    if not subsets or min(map(len, subsets.values())) < 2:
        return None
    means = []
    for subset, own in subsets.items():
        # keyed by the subset: one that is a category by itself has one interval, whatever else is in the table
        stratum = own[0][0].tags.get("stratum", subset)
        rng = np.random.default_rng([seed, zlib.crc32(stratum.encode())])
        drawn = rng.integers(len(own), size=(resamples, len(own)))
        differences = np.array([difference for _, difference in own])
        weights = np.array([example.weight for example, _ in own])
        means.append((differences * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1))  # [resamples]
    if len(means) == 1:
        low, high = np.percentile(task.metric.scale * means[0], [2.5, 97.5])
        return float(low), float(high)
    # every row is a mean of subset means, so one sample per subset that carries the drawn mean gives the row's own
    stand_ins = [own[0][0] for own in subsets.values()]
    values = [_score_of(key, task.summarize(list(zip(stand_ins, drawn)))) for drawn in np.stack(means, axis=1).tolist()]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _score_of(key: tuple[str, str], rows: Sequence[Row]) -> float:
    return next(row.score or 0.0 for row in rows if _key(row) == key)
