"""Methods ranked per budget: `python -m analysis.leaderboard RESULTS`.

Methods are ranked by the mean over tasks of the share of the full cache's score that is left (tasks with scores out of
100 only; tasks near chance are left out). Those whose difference to the best is no more than noise share its rank.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import stats
from analysis.frontier import markdown
from analysis.load import NothingToRead, Results, load
from analysis.points import NEAR_CHANCE, by_sample, labels


def ranking(results: Results, model: str, protocol: str, budget: float) -> pd.DataFrame:
    """One row per method that has every task at this budget: retained share with interval, rank."""
    cells = results.cells.assign(label=labels(results.cells))
    cells = cells[(cells["model"] == model) & (cells["protocol"] == protocol)]
    cells = cells[[m["better"] == "higher" for m in cells["metric"]]]
    at = cells[cells["budget"] == budget]
    tasks = sorted(set(at["task"]) & set(cells[cells["method"] == "full"]["task"]))
    kept: dict[str, list[np.ndarray]] = {}
    for task in tasks:
        full = cells[(cells["task"] == task) & (cells["method"] == "full")]
        scores = by_sample(results, full)
        if full["mean_over"].iloc[0] == "subsets":
            scores["category"] = ""
        names = sorted(set(at[at["task"] == task]["label"]) - {"full"})
        parts = {name: by_sample(results, at[(at["task"] == task) & (at["label"] == name)]) for name in names}
        shared = scores.index
        for part in parts.values():
            shared = shared.intersection(part.index)
        if not len(shared):
            continue
        scores = scores.loc[shared]
        own = stats.weights(scores["subset"], scores["category"])
        if 100 * float(own @ scores["score"].to_numpy()) < NEAR_CHANCE:
            continue
        both = np.vstack([own, stats.draws(scores["subset"], scores["category"])])  # the score itself, then resamples
        whole = np.maximum(both @ scores["score"].to_numpy(), 1e-9)
        for name, part in parts.items():
            kept.setdefault(name, []).append(both @ part.loc[shared, "score"].to_numpy() / whole)
    complete = {name: np.mean(shares, axis=0) for name, shares in kept.items() if len(shares) == _most(kept)}
    if not complete:
        return pd.DataFrame()
    best = max(complete, key=lambda name: complete[name][0])
    rows = []
    for name in sorted(complete, key=lambda name: -complete[name][0]):
        share = complete[name]
        low, high = stats.interval(share[1:])
        behind = stats.interval((complete[best] - share)[1:])[0] > 0
        rank = 1 if not behind else 1 + sum(other[0] > share[0] for other in complete.values())
        rows.append(
            {
                "rank": rank,
                "method": name,
                "retained": f"{share[0]:.1%}",
                "95 % interval": f"{low:.1%} to {high:.1%}",
                "tasks": _most(kept),
            }
        )
    return pd.DataFrame(rows)


def _most(kept: dict[str, list[np.ndarray]]) -> int:
    return max(len(shares) for shares in kept.values())


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 when there is nothing to rank."""
    parser = argparse.ArgumentParser(prog="python -m analysis.leaderboard", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
    except NothingToRead as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    for problem in results.problems:
        print(problem, file=sys.stderr)
    found = results.cells[results.cells["method"] != "full"][["model", "protocol", "budget"]].drop_duplicates()
    shown = 0
    for model, protocol, budget in sorted(found.itertuples(index=False, name=None)):
        ranks = ranking(results, model, protocol, budget)
        if len(ranks):
            shown += 1
            print(f"{model}, {protocol}, budget {budget:g}\n\n{markdown(ranks)}")
    if not shown:
        print("leaderboard: no method has finished samples in common with the full cache", file=sys.stderr)
    return 0 if shown else 2


if __name__ == "__main__":
    sys.exit(main())
