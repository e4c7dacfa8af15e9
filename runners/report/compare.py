"""A method against the full cache on the same samples: the result rows and paired bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis import stats
from tasks.base import Example, Task
from tasks.table import Mean, Row


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
        """The method's score less the full cache's, in the metric's unit; None where either has none."""
        if self.row.score is None or self.full.score is None:
            return None
        return self.row.score - self.full.score


Samples = Sequence[tuple[Example, float, float]]


def compare_scores(task: Task, samples: Samples, resamples: int, seed: int) -> list[Compared]:
    """The task's result rows for samples (example, the method's score, the full cache's score).

    Samples are drawn with replacement inside each subset, in pairs, and averaged as the task averages; the interval is
    the plain percentile one of `analysis.stats`. The same samples give the same intervals, in whatever order. Parts of
    one sample are drawn together.
    """
    rows = task.summarize([(example, score) for example, score, _ in samples])
    full = task.summarize([(example, score) for example, _, score in samples])
    means = task.means([example for example, _, _ in samples])
    return [
        Compared(row, of_full, _interval(task, mean, samples, resamples, seed), task.metric.digits)
        for row, of_full, mean in zip(rows, full, means, strict=True)
    ]


def whole(task: Task, samples: Samples, resamples: int, seed: int) -> Compared:
    """The row that stands for the whole task; samples: as in `compare_scores`, each once, with its own score."""
    mean = task.whole([example for example, _, _ in samples])
    ours, full = (np.array(scores, dtype=float) for scores in zip(*((a, b) for _, a, b in samples)))
    row, of_full = (mean.row(scores, task.metric.scale) for scores in (ours, full))
    return Compared(row, of_full, _interval(task, mean, samples, resamples, seed), task.metric.digits)


def _interval(task: Task, mean: Mean, samples: Samples, resamples: int, seed: int) -> tuple[float, float] | None:
    tags = [example.tags for example, _, _ in samples]
    parts = [sample_tags["subset"] for sample_tags in tags]
    strata = [
        stats.stratum(sample_tags["category"], sample_tags.get("stratum", sample_tags["subset"]))
        for sample_tags in tags
    ]
    if stats.rests_on_one(mean.weights, [f"{stratum}/{part}" for stratum, part in zip(strata, parts)]):
        return None
    gains = task.metric.scale * np.array([[ours - full] for _, ours, full in samples])  # [n, 1]
    ids = [example.id for example, _, _ in samples]
    low, high = stats.interval(stats.row(gains, mean.weights, ids, strata, parts, resamples, seed)[1:, 0])
    return float(low), float(high)
