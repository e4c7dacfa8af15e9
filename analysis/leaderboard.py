"""Methods ranked per budget: `python -m analysis.leaderboard RESULTS`.

Methods are ranked by the mean over tasks of the share of the full cache's score that is left (tasks with scores out of
100 only; tasks near chance are named and left out). Those whose difference to the best is no more than noise, after
Holm's correction for as many methods, share its rank.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import stats
from analysis.command import RESULTS, Command
from analysis.frontier import show
from analysis.load import load_results
from analysis.paired import Cells, Compared, gathered, holm, near_chance, seed_scores, subset_means


@dataclass
class Ranking:
    """rows: one per method that has every task: rank, retained share with interval.  apart: tasks near chance.

    lacking: by method that is not ranked, the tasks that it lacks.
    """

    rows: pd.DataFrame
    apart: list[str]
    lacking: dict[str, list[str]]


def ranking(tasks: Sequence[Compared], model: str, protocol: str, budget: float) -> Ranking:
    """The methods at one budget; where none has every task, those that have the same ones as the one with most."""
    kept: dict[str, dict[str, np.ndarray]] = {}
    apart, samples, lone = [], dict[str, int](), set[str]()
    for task in tasks:
        if (task.key["model"], task.key["protocol"]) != (model, protocol):
            continue
        at = [one for one in task.cells if one.first["budget"] == budget and one.first["method"] != "full"]
        if not at or at[0].first["metric"]["better"] != "higher":
            continue
        shares, samples[task.key["task"]], rests_on_one = _retained(at)
        if rests_on_one:
            lone.add(task.key["task"])
        if shares is None:
            apart.append(task.key["task"])
        for name, share in (shares or {}).items():
            kept.setdefault(name, {})[task.key["task"]] = share
    wanted = max(
        map(frozenset, kept.values()), key=lambda retained: (len(retained), sorted(retained)), default=frozenset()
    )
    complete = {
        name: np.mean([retained[task] for task in sorted(wanted)], axis=0)
        for name, retained in kept.items()
        if wanted <= retained.keys()
    }
    lacking = {
        name: sorted(wanted - retained.keys()) for name, retained in kept.items() if not wanted <= retained.keys()
    }
    order = sorted(complete, key=lambda name: -complete[name][0])
    unsure = bool(wanted & lone)  # nothing is known of how a lone sample's score varies
    behind = [False] * len(order) if unsure else _behind([complete[name] for name in order])
    rows = []
    for i, name in enumerate(order):
        low, high = stats.interval(complete[name][1:])
        worst = min(sorted(wanted), key=lambda task: kept[name][task][0])
        rows.append(
            {
                "rank": i + 1 if behind[i] else 1,
                "method": name,
                "retained": f"{complete[name][0]:.1%}",
                "95 % interval": "-" if unsure else f"{low:.1%} to {high:.1%}",
                "worst task": f"{worst} {kept[name][worst][0]:.1%}",
                "tasks": len(wanted),
                "n": sum(samples[task] for task in wanted),
            }
        )
    return Ranking(pd.DataFrame(rows), apart, lacking)


def _retained(cells: Sequence[Cells]) -> tuple[dict[str, np.ndarray] | None, int, bool]:
    """By method, the share of the full cache's score on the samples that all have, [1 + R]; None near chance.

    Beside it how many samples these are, and whether a subset has a single one.
    """
    shared = cells[0].samples.index
    for one in cells[1:]:
        shared = shared.intersection(one.samples.index)
    if shared.empty:
        return {}, 0, False
    first = cells[0].samples.loc[shared]
    scores = [seed_scores(one.samples.loc[shared]) for one in cells]
    sides = [(str(one.first["method"]), own.shape[1]) for one, own in zip(cells, scores)]
    columns = np.hstack([*scores, first[["full", "chance"]].to_numpy()])
    by_seed = subset_means(first, columns, cells[0].first["mean_over"])
    means = by_seed.over_seeds([*sides, ("full", 1), ("", 1)]).average()  # [1 + R, k + 2]
    full, chance = means[:, -2], means[0, -1]
    metric = cells[0].first["metric"]
    if near_chance(stats.estimate(metric["scale"] * full), metric["scale"] * chance, metric):
        return None, 0, False
    whole = np.maximum(full, 1e-9)
    names = [" ".join(filter(None, (one.first["label"], one.first["bits"]))) for one in cells]
    return {name: means[:, i] / whole for i, name in enumerate(names)}, len(shared), by_seed.rests_on_one()


def _behind(shares: Sequence[np.ndarray]) -> list[bool]:
    """Which methods, best first, are worse than the best by more than noise; shares are [1 + R] each."""
    if len(shares) < 2:
        return [False] * len(shares)
    best = shares[0]
    p = [min(1.0, 2 * (1 + int((share[1:] >= best[1:]).sum())) / len(share)) for share in shares[1:]]
    return [False, *(corrected < stats.SURE for corrected in holm(p))]


def run(given: argparse.Namespace) -> int:
    """Rank and print; the exit code: 2 when there is nothing to rank. Raises NothingToRead."""
    results = load_results(given.results, given.all_generations)
    tasks = list(gathered(results))
    for problem in results.problems:
        print(problem, file=sys.stderr)
    settings = results.cells[results.cells["method"] != "full"][["model", "protocol", "budget"]].drop_duplicates()
    shown = 0
    for model, protocol, budget in sorted(settings.itertuples(index=False, name=None)):
        found_here = ranking(tasks, model, protocol, budget)
        if len(found_here.rows) or found_here.apart:
            shown += 1
            print(f"{model}, {protocol}, budget {budget:g}\n")
        if len(found_here.rows):
            show(found_here.rows, given.markdown)
        for name, tasks_lacking in found_here.lacking.items():
            print(f"not ranked: {name}, which has no {', '.join(tasks_lacking)}\n")
        if found_here.apart:
            print(f"near chance with the full cache, not counted: {', '.join(found_here.apart)}\n")
    if not shown:
        print("leaderboard: no method has finished samples in common with the full cache", file=sys.stderr)
    return 0 if shown else 2


main = Command(
    "leaderboard", __doc__ or "", run, lambda parser: None, default=RESULTS, markdown=True,
    results="a folder of records, or a file of them (default: results)",
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
