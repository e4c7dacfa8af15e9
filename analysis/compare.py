"""Did my change help? `python -m analysis.compare A B` compares two methods, or two result folders.

Two folders: every cell that both hold, sample by sample. Two names of methods (with `--results`): the cells at the same
budget on the same task. Prints B minus A with its paired interval, flips in both directions and p-values after Holm's
correction.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis import stats
from analysis.frontier import markdown
from analysis.load import NothingToRead, Results, load
from analysis.points import by_sample, labels

SETTINGS = ["model", "task", "protocol", "budget"]


def pairs(a: Results, b: Results, names: tuple[str, str] | None = None) -> list[tuple[dict, pd.DataFrame]]:
    """What is the same on both sides, and the samples that both have: columns a, b, subset, category.

    names: compare these two curves; None compares each curve with itself.
    """
    made = []
    left, right = (r.cells.assign(label=labels(r.cells)) for r in (a, b))
    for key, group in left.groupby([*SETTINGS, "label"], sort=True):
        settings = dict(zip([*SETTINGS, "label"], key))
        if names and settings["label"] != names[0]:
            continue
        other = right[right["label"] == (names[1] if names else settings["label"])]
        for column in SETTINGS:
            other = other[other[column] == settings[column]]
        ours, theirs = by_sample(a, group), by_sample(b, other)
        both = ours.join(theirs[["score"]].rename(columns={"score": "b"}), how="inner").rename(columns={"score": "a"})
        if len(both):
            if group["mean_over"].iloc[0] == "subsets":
                both["category"] = ""
            made.append((settings | {"metric": group["metric"].iloc[0]}, both))
    return made


def table(found: list[tuple[dict, pd.DataFrame]]) -> pd.DataFrame:
    """One row per pair: scores, difference with interval, flips, p."""
    rows = []
    for settings, both in found:
        metric = settings["metric"]
        scale, digits = metric["scale"], metric["digits"]
        own = stats.weights(both["subset"], both["category"])
        drawn = stats.draws(both["subset"], both["category"])
        a, b = scale * both["a"].to_numpy(), scale * both["b"].to_numpy()
        gain = stats.estimate(b - a, own, drawn)
        lost, won, _ = stats.flips(both["b"].to_numpy(), both["a"].to_numpy())
        better = gain.value > 0 if metric["better"] == "higher" else gain.value < 0
        rows.append(
            {
                **{k: v for k, v in settings.items() if k != "metric"},
                "n": len(both),
                "A": f"{float(own @ a):.{digits}f}",
                "B": f"{float(own @ b):.{digits}f}",
                "B - A": f"{gain.value:+.{digits}f} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]",
                "lost/won": f"{lost}/{won}",
                "p": stats.p_value(b - a, own),
                "verdict": "tie" if gain.is_tie else "B is better" if better else "A is better",
            }
        )
    made = pd.DataFrame(rows)
    if len(made):
        made["p (Holm)"] = [f"{p:.3f}" for p in stats.holm(list(made.pop("p")))]
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 when there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m analysis.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("a", metavar="A", help="a method's name, or a folder of results")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where two methods are looked for")
    given = parser.parse_args(arguments)
    try:
        folders = [Path(x) for x in (given.a, given.b)]
        if all(f.is_dir() for f in folders):
            sides, names = [load(f) for f in folders], None
        else:
            one = load(given.results)
            sides, names = [one, one], (given.a, given.b)
            known = sorted(set(labels(one.cells)))
            for name in names:
                if name not in known:
                    raise NothingToRead(f"{name}: neither a folder nor a method in {given.results}; {', '.join(known)}")
        for problem in {p for side in sides for p in side.problems}:
            print(problem, file=sys.stderr)
        made = table(pairs(sides[0], sides[1], names))
        if made.empty:
            raise NothingToRead("no cell at the same model, task, protocol and budget has samples on both sides")
    except NothingToRead as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(f"A = {given.a}, B = {given.b}\n\n{markdown(made)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
