"""Did my change help? `python -m analysis.compare A B` compares two methods, or two result folders.

Two folders: every cell that both hold, sample by sample. Two names of methods (with `--results`): the cells at the same
budget on the same task. Prints B minus A with its paired interval, flips in both directions and p-values after Holm's
correction. One side is better where the interval excludes zero and that p is below 0.05.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.command import RESULTS, Command
from analysis.files import given_path
from analysis.frontier import brackets, show
from analysis.load import NothingToRead, Results, load_results
from analysis.names import at, bits, labels
from analysis.paired import CONTENT, beside, by_sample, holm, seed_scores, subset_means

SETTINGS = ["model", "task", "protocol", "budget", "bits"]
SAME = {"weights": "the model's weights", "dtype": "dtype", "passes": "the passes"}


@dataclass
class Pair:
    """What is the same on both sides, and the samples that both have: columns a, b, and where they belong.

    methods: the names of both sides, by which seeds are drawn.
    """

    settings: dict[str, Any]
    first: pd.Series
    methods: tuple[str, str]
    samples: pd.DataFrame


def pair_cells(a: Results, b: Results, names: tuple[str, str] | None = None) -> tuple[list[Pair], list[str]]:
    """Cells of both sides at the same settings, and what kept others from being compared, one line each.

    names: compare these two curves; None compares each curve with itself.
    """
    paired, problems = [], []
    left, right = _named(a, b)
    for key, group in left.groupby([*SETTINGS, "label", "config"], sort=True):
        settings = dict(zip([*SETTINGS, "label"], key))
        if names and settings["label"] != names[0]:
            continue
        other = right[right["label"] == (names[1] if names else settings["label"])]
        for column in [*SETTINGS, *([] if names else ["config"])]:
            other = other[other[column] == (group["config"].iloc[0] if column == "config" else settings[column])]
        if other.empty:
            continue
        where = f"{settings['task']}, {settings['label']} at {at(settings)}"
        first, second = group.iloc[0], other.iloc[0]
        if first["paired"] != second["paired"]:
            problems.append(f"{where}: left out, the task's samples or scores are not the same on both sides")
            continue
        problems += [f"{where}: {what} differ" for column, what in SAME.items() if first[column] != second[column]]
        ours, theirs = by_sample(a, list(group["cell"])), by_sample(b, list(other["cell"]))
        told = [column for column in theirs.columns if column.startswith("score") or column in CONTENT]
        both, others = beside(_scores_as("a", ours), _scores_as("b", theirs[told]))
        if others:
            problems.append(f"{where}: {others} samples left out, their contents are not the same on both sides")
        if len(both):
            paired.append(Pair(settings, first, (str(first["method"]), str(second["method"])), both))
        else:
            problems.append(f"{where}: left out, no sample is finished on both sides")
    return paired, problems


def _scores_as(side: str, samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with `side` for `score` in the names of columns."""
    return samples.rename(
        columns={name: name.replace("score", side, 1) for name in samples if name.startswith("score")}
    )


def _named(a: Results, b: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of both sides with `label` and `bits`, a curve's name being the same on both."""
    sides = [r.cells.assign(side=i, bits=r.cells["config"].map(bits)) for i, r in enumerate((a, b))]
    both = pd.concat(sides, ignore_index=True)
    both["label"] = labels(both)
    return both[both["side"] == 0], both[both["side"] == 1]


def comparison(paired: list[Pair]) -> pd.DataFrame:
    """One row per pair and measure: scores, difference with interval, flips, p."""
    rows = []
    for pair in paired:
        for measure, both in pair.samples.groupby("measure", sort=False):
            several = pair.samples["measure"].nunique() > 1
            rows.append(_row(pair, both, f", {measure}" if several else ""))
    frame = pd.DataFrame(rows)
    if len(frame):
        p = np.array(holm(list(frame.pop("p"))))
        frame["p (Holm)"] = [stats.p_text(one) for one in p]
        frame.loc[p >= stats.SURE, "verdict"] = "tie"
        if not frame["bits"].any():
            frame = frame.drop(columns="bits")
    return frame


def _row(pair: Pair, both: pd.DataFrame, measure: str) -> dict[str, Any]:
    metric, over = pair.first["metric"], pair.first["mean_over"]
    scale, digits = metric["scale"], metric["digits"]
    a, b = scale * both["a"].to_numpy(), scale * both["b"].to_numpy()
    seeds = [scale * seed_scores(both, side) for side in "ab"]  # each [n, seeds]
    sides = [(method, own.shape[1]) for method, own in zip(pair.methods, seeds)]
    means = subset_means(both, np.hstack(seeds), over).over_seeds(sides)
    averages = means.average()  # [1 + R, 2]
    signed = subset_means(both, (b - a)[:, None], over, stats.signed).average()[:, 0]
    gain = stats.estimate(averages[:, 1] - averages[:, 0])
    lone = stats.rests_on_one(means.sample_weights(), [str(subset) for subset in means.place])
    interval = "[-]" if lone else brackets(gain.low, gain.high, digits)
    higher = metric["better"] == "higher"
    lost, won, _ = stats.flips(both["b"].to_numpy(), both["a"].to_numpy())
    return {
        **pair.settings,
        "task": pair.settings["task"] + measure,
        "n": len(both),
        "A": f"{averages[0, 0]:.{digits}f}",
        "B": f"{averages[0, 1]:.{digits}f}",
        "B - A": f"{gain.value:+.{digits}f} {interval}",
        "lost/won": f"{lost}/{won}" if higher else "",
        "p": stats.p_value(signed, means.sample_weights() * (b - a)),
        "verdict": "tie" if lone or gain.is_tie else "B is better" if (gain.value > 0) == higher else "A is better",
    }


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("a", metavar="A", help="a method's name, or a folder of results")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--results", type=given_path, default=RESULTS, help="where two methods are looked for")


def run(given: argparse.Namespace) -> int:
    """Compare and print. Raises NothingToRead."""
    folders = [Path(x) for x in (given.a, given.b)]
    if all(f.exists() for f in folders):
        sides, names = [load_results(f, given.all_generations) for f in folders], None
    else:
        one = load_results(given.results, given.all_generations)
        sides, names = [one, one], (given.a, given.b)
        known = sorted(set(labels(one.cells)))
        for name in names:
            if name not in known:
                raise NothingToRead(f"{name}: neither a folder nor a method in {given.results}; {', '.join(known)}")
    paired, problems = pair_cells(sides[0], sides[1], names)
    for problem in dict.fromkeys([p for side in sides for p in side.problems] + problems):
        print(problem, file=sys.stderr)
    frame = comparison(paired)
    if frame.empty:
        raise NothingToRead("no cell at the same model, task, protocol and budget has samples on both sides")
    print(f"A = {given.a}, B = {given.b}\n")
    show(frame, given.markdown)
    return 0


main = Command("compare", __doc__ or "", run, options, markdown=True).main

if __name__ == "__main__":
    sys.exit(main())
