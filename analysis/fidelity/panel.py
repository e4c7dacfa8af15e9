"""The fidelity panel of a cell: means over its samples with paired intervals, and the label they earn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from analysis import stats
from analysis.fidelity.numbers import (
    Answer,
    Forced,
    answer_of,
    first_divergence,
    forced_of,
    is_early,
    is_runaway,
    loop,
    repetition,
    shared_prefix,
)  # fmt: skip
from analysis.stats import Estimate

ENOUGH = 20  # samples of a label
#: what an answer may suffer, each of the method's answer beside the full cache's
FAULTS: dict[str, Callable[[Answer, Answer], bool]] = {
    "empty": lambda ours, full: ours.blank or not ours.text_ids,
    "early": is_early,
    "loop": lambda ours, full: loop(ours.text_ids) is not None,
    "runaway": is_runaway,
}
#: labels, the most harmful first, and the colours of those that are shown in one
LABELS = ("unread", "broken", "far", "suspect", "near")
COLOURS = {"unread": "red", "broken": "red", "far": "yellow", "suspect": "yellow"}
BROKEN, SUSPECT = 0.10, 0.02  # of the answers: an excess of faults over the full cache's
BROKEN_RATIO, SUSPECT_RATIO = (0.5, 2.0), (0.8, 1.25)  # of the tokens of all answers
FAR_KL, SUSPECT_KL = 1.0, 0.1  # nats per token
FAR_AGREE, SUSPECT_AGREE = 0.5, 0.9


@dataclass(frozen=True)
class Sample:
    """A sample of a cell beside the full cache's.

    stratum: what it is drawn from in the score's bootstrap.  solved: whether the full cache solves it.
    """

    id: str
    stratum: str
    ours: Answer
    full: Answer
    forced: Forced | None = None
    solved: bool = False


@dataclass(frozen=True)
class Excess:
    """The share of a cell's answers with a fault, the full cache's, and their difference with its interval."""

    ours: float
    full: float
    excess: Estimate


@dataclass(frozen=True)
class Panel:
    """What a cell's answers have lost; None where there is nothing to say it from.

    n, n_forced: samples of the free and of the forced half.  short: forced ones without a place that counts, which are
    in no mean.  faulty: forced ones with a KL that is not finite.  apart: those where the forced pass does not part
    from the full cache's answer where the free run does.
    kl, agree, clear_flips, dnll: means of sample means.  kl_solved: over samples that the full cache solves.
    kl_max, kl_most: median and maximum of the samples' largest KL.  kl_q99: of all tokens.
    uncounted: the largest KL, without its sign, of a place that does not count, which the exact prefill gave.
    divergence: median of the first token that differs, infinite where most answers are the same.
    identical, shared_prefix, out_ratio, faults, repetition: of the free run.  cut: full answers at their limit.
    drawn: answers were drawn, with the same random numbers for both caches (the divergence is `coupled`).
    """

    n: int
    n_forced: int
    short: int
    faulty: int
    apart: int
    cut: float
    divergence: float
    identical: Estimate
    shared_prefix: Estimate
    out_ratio: Estimate | None
    faults: dict[str, Excess]
    repetition: tuple[float, float]
    drawn: bool = False
    unread: bool = False
    uncounted: float | None = None
    kl: Estimate | None = None
    kl_solved: float | None = None
    kl_max: float | None = None
    kl_most: float | None = None
    kl_q99: float | None = None
    agree: Estimate | None = None
    clear_flips: float | None = None
    dnll: Estimate | None = None
    label: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _label(self))


def sample_of(
    id: str, stratum: str, ours: Mapping[str, Any], full: Mapping[str, Any], solved: bool = False
) -> Sample | None:
    """A sample from its two lines; None where one of them has no ids of an answer."""
    mine, theirs = answer_of(ours), answer_of(full)
    if mine is None or theirs is None:
        return None
    return Sample(id, stratum, mine, theirs, forced_of(ours), solved)


def panel(samples: Sequence[Sample], compressed: bool, resamples: int = stats.RESAMPLES, seed: int = 0) -> Panel | None:
    """The panel of a cell; None without a sample.

    compressed: whether less was asked for than the full cache, so that a KL of exactly 0 everywhere says that the
    compressed cache was not what attention read.
    """
    if not samples:
        return None
    draws = _Draws(samples, resamples, seed)
    full_n, our_n = ([float(len(answer(one).text_ids)) for one in samples] for answer in (_full, _ours))
    same = [float(one.ours.ids == one.full.ids) for one in samples]
    prefix = [shared_prefix(one.full.ids, one.ours.ids) for one in samples]
    ours, full = (
        [[float(found(answer(one), one.full)) for found in FAULTS.values()] for one in samples]
        for answer in (_ours, _full)
    )
    faults = np.array(ours) - np.array(full)  # [n, 4]
    means = draws.means(np.column_stack([same, prefix, our_n, full_n, faults]))  # [1 + R, 8]
    at = [first_divergence(one.full.ids, one.ours.ids) for one in samples]
    forced = [one for one in samples if one.forced is not None]
    return Panel(
        n=len(samples),
        n_forced=len(forced),
        short=sum(not one.counts for one in map(_forced, forced)),
        faulty=sum(not one.is_finite for one in map(_forced, forced)),
        apart=sum(map(_parts_elsewhere, forced)),
        cut=sum(one.full.is_cut for one in samples) / len(samples),
        divergence=float(median(float("inf") if one is None else one for one in at)),
        identical=stats.estimate(means[:, 0]),
        shared_prefix=stats.estimate(means[:, 1]),
        out_ratio=_ratio(means[:, 2], means[:, 3]),
        faults={
            name: Excess(share, of_full, stats.estimate(means[:, 4 + i]))
            for i, (name, share, of_full) in enumerate(zip(FAULTS, np.mean(ours, axis=0), np.mean(full, axis=0)))
        },
        repetition=(_repetition(samples, _ours), _repetition(samples, _full)),
        drawn=any(_forced(one).drawn for one in forced),
        **_forced_half(forced, compressed, resamples, seed),
    )


def _forced_half(forced: Sequence[Sample], compressed: bool, resamples: int, seed: int) -> dict[str, Any]:
    first = [abs(one) for sample in forced for one in _forced(sample).kl[: _forced(sample).counted] if one is not None]
    uncounted = {"uncounted": max(first, default=None)}
    whole = [one for one in forced if _forced(one).counts and _forced(one).is_finite]
    if not whole:
        return uncounted
    found = [_forced(one) for one in whole]
    tokens = np.array([kl for one in found for kl in one.counts])
    values = [[one.mean, 1 - one.share(one.differ), one.share(one.clear), one.dnll or 0.0] for one in found]
    means = _Draws(whole, resamples, seed).means(np.array(values))
    largest = [one.largest[0] for one in found]
    solved = [one.mean for sample, one in zip(whole, found) if sample.solved]
    return uncounted | {
        "unread": compressed and not tokens.any(),
        "kl": stats.estimate(means[:, 0]),
        "kl_solved": sum(solved) / len(solved) if solved else None,
        "kl_max": float(median(largest)),
        "kl_most": max(largest),
        "kl_q99": float(np.percentile(tokens, 99)),
        "agree": stats.estimate(means[:, 1]),
        "clear_flips": float(means[0, 2]),
        "dnll": stats.estimate(means[:, 3]),
    }


class _Draws:
    """The score's bootstrap over some samples, each of which counts alike."""

    def __init__(self, samples: Sequence[Sample], resamples: int, seed: int):
        self.ids, self.strata = [one.id for one in samples], [one.stratum for one in samples]
        self.weights = np.full(len(samples), 1 / len(samples))
        self.resamples, self.seed = resamples, seed
        if stats.rests_on_one(self.weights, self.strata):  # it would never be drawn anew
            self.strata = [""] * len(samples)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means of values [n, k], [1 + resamples, k]: their own, then with samples drawn anew."""
        return stats.row(values, self.weights, self.ids, self.strata, None, self.resamples, self.seed)


def _label(panel: Panel) -> str:
    """By the card's precedence; nothing for fewer than ENOUGH samples."""
    forced = panel.n_forced - panel.short >= ENOUGH and panel.kl is not None and panel.agree is not None
    kl, agree = (panel.kl.value, panel.agree.value) if forced and panel.kl and panel.agree else (0.0, 1.0)
    if forced and panel.unread:
        return "unread"
    if panel.n < ENOUGH:
        return ""
    excess, ratio = [one.excess for one in panel.faults.values()], panel.out_ratio
    if (
        panel.faulty
        or any(one.value >= BROKEN and one.low > 0 for one in excess)
        or (ratio and (ratio.high < BROKEN_RATIO[0] or ratio.low > BROKEN_RATIO[1]))
    ):
        return "broken"
    if kl > FAR_KL or agree < FAR_AGREE:
        return "far"
    off = ratio and not SUSPECT_RATIO[0] <= ratio.value <= SUSPECT_RATIO[1] and not ratio.low <= 1 <= ratio.high
    if any(one.value >= SUSPECT and one.low > 0 for one in excess) or off or kl > SUSPECT_KL or agree < SUSPECT_AGREE:
        return "suspect"
    return "near" if forced else ""


def _ratio(ours: np.ndarray, full: np.ndarray) -> Estimate | None:
    if not full[0]:
        return None
    some = full > 0
    return stats.estimate(ours[some] / full[some])


def _parts_elsewhere(sample: Sample) -> bool:
    """Whether the forced pass parts from the full cache's answer at another token than the free run does."""
    forced = _forced(sample)
    if forced.drawn:  # what is drawn need not be the likeliest
        return False
    free = first_divergence(sample.full.ids, sample.ours.ids)
    return forced.flip != (free if free is not None and free < len(forced.kl) else None)


def _repetition(samples: Sequence[Sample], answer: Callable[[Sample], Answer]) -> float:
    return sum(repetition(answer(one).text_ids) for one in samples) / len(samples)


def _ours(sample: Sample) -> Answer:
    return sample.ours


def _full(sample: Sample) -> Answer:
    return sample.full


def _forced(sample: Sample) -> Forced:
    assert sample.forced is not None
    return sample.forced
