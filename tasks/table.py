"""The result table of a task: each row is a weighted mean of samples, known before any score is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

EXACT = 10  # decimals of a mean that the order of its sum leaves alone


@dataclass(frozen=True)
class Metric:
    """What a sample's score is, and how the table shows a mean of them.

    unit: of the table's numbers.  scale: the table shows so many times the score.  digits: decimal places of it.
    """

    name: str = "score"
    unit: str = "points of 100"
    better: Literal["higher", "lower"] = "higher"
    scale: float = 100
    digits: int = 2


@dataclass(frozen=True)
class Row:
    """One line of the result table.

    kind: "subset", "bin", "category" or "average".
    n: samples behind the score.
    score: in the metric's unit, a mean of exact scores; None when n is 0.
    note: how it was averaged, where that is not obvious.
    """

    name: str
    kind: str
    n: int
    score: float | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Mean:
    """One line of the result table before any score is known: a weighted mean of samples.

    weights: what each sample counts, [n]; they add up to 1, and are 0 for a sample that does not count.
    name, kind, note: as in Row.
    """

    name: str
    kind: str
    weights: np.ndarray
    note: str = ""

    @property
    def n(self) -> int:
        """Samples that count."""
        return int(np.count_nonzero(self.weights))

    def row(self, scores: np.ndarray, scale: float) -> Row:
        """The line of scores [n], in the unit that is `scale` times theirs."""
        mean = round(scale * float(self.weights @ scores), EXACT) if self.n else None
        return Row(self.name, self.kind, self.n, mean, self.note)


def mean_by_category(subsets: Iterable[tuple[dict[str, Any], Mean]]) -> list[Mean]:
    """One line per category: the plain mean of its subsets, whatever their sizes.

    Parts that were drawn from one subset stand for that subset together, however many there are.
    """
    members: dict[str, dict[str, list[Mean]]] = {}
    for tags, mean in subsets:
        drawn_from = members.setdefault(tags["category"], {})
        drawn_from.setdefault(tags.get("stratum", tags["subset"]), []).append(mean)
    means = []
    for name, strata in members.items():
        whole = [mean_of(stratum, "subset", parts, "parts") for stratum, parts in strata.items()]
        of = sum(map(len, strata.values()))
        means.append(replace(mean_of(name, "category", whole, ""), note=f"mean of {of} subsets" if of > 1 else ""))
    return means


def average_rows(name: str, subsets: Sequence[tuple[dict[str, Any], Mean]]) -> list[Mean]:
    """The mean of the category means, as one line; none for fewer than two categories."""
    categories = mean_by_category(subsets)
    return [mean_of(name, "average", categories, "category means")] if len(categories) > 1 else []


def mean_of(name: str, kind: str, means: Sequence[Mean], what: str) -> Mean:
    """The plain mean of the means that hold a sample; what: as its note calls them, where there are several."""
    weights = [mean.weights for mean in means if mean.n]
    return Mean(
        name, kind, np.mean(weights, axis=0) if weights else means[0].weights,
        f"mean of {len(weights)} {what}" if len(weights) > 1 else "",
    )  # fmt: skip
