"""Accuracy against memory: `python -m analysis.frontier RESULTS` draws the frontiers of all records below a folder.

Writes frontier.png and frontier.svg (a panel per task), frontier.csv, frontier.md and frontier.tex. A curve's points
are a method's cells; the black line is the full cache with its interval; hollow points only simulate their saving.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import stats, style
from analysis.load import NothingToRead, load
from analysis.points import AXES, WHOLE, curves, on_front, points

AXIS_NAMES = {
    "held": "share of the full cache's bytes held",
    "read": "share of the full cache's bytes read per step",
    "peak": "peak share of the full cache's bytes",
}


def draw(table: pd.DataFrame, x: str, log: bool = True, columns: int = 2) -> Any:
    """A matplotlib figure with one panel per task and protocol; table as `points` makes it, whole tasks only."""
    import matplotlib.pyplot as plt

    table = table[(table["category"] == WHOLE) & ~table["near_chance"]]
    panels = list(table.groupby(["model", "task", "protocol"], sort=True))
    if not panels:
        raise NothingToRead("no task with a full cache's score above chance")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    names = sorted(set(table["label"]) - {"full"})
    colour = style.colours(names)
    with plt.rc_context(style.RC):
        size = (style.COLUMN * columns, 2.3 * rows + 0.17 * -(-len(names) // (3 * columns)) + 0.25)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, ((model, task, protocol), group) in zip(axes.flat, panels):
            _panel(axis, group, colour, log)
            models = table["model"].nunique() > 1
            axis.set_title(f"{model}, {task} ({protocol})" if models else f"{task} ({protocol})")
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel(AXIS_NAMES[x])
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 * columns, frameon=False)
    return figure


def _panel(axis: Any, group: pd.DataFrame, colour: dict[str, str], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    full = group.iloc[0]
    axis.axhspan(full["full_low"], full["full_high"], color="black", alpha=0.08, lw=0)
    axis.axhline(full["full"], color="black", lw=0.9, label="full")
    for label, line in curves(group[group["method"] != "full"]):
        marker, stroke = style.family(line["family"].iloc[0])
        hollow = bool(line["simulated"].iloc[0])
        low, high = line["score"] - line["score_low"], line["score_high"] - line["score"]
        axis.errorbar(
            line["share"], line["score"], yerr=[low.clip(lower=0), high.clip(lower=0)], label=label,
            color=colour[label], marker=marker, linestyle=stroke, elinewidth=0.6, capsize=1.5,
            markerfacecolor="none" if hollow else colour[label],
        )  # fmt: skip
    if log:
        axis.set_xscale("log")
        smallest = group["share"].min()
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if t >= 0.7 * smallest]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylabel(textwrap.fill(f"{full['metric']}, {full['unit']}", 30))
    axis.grid(alpha=0.25, lw=0.4)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The table for people: one row per point of a whole task, differences that are no more than noise as ties."""
    whole = table[table["category"] == WHOLE].assign(front=on_front(table))
    rows = []
    for _, p in whole.sort_values(["model", "task", "protocol", "label", "share"]).iterrows():
        digits = p["digits"]
        rows.append(
            {
                "task": p["task"],
                "protocol": p["protocol"],
                "method": p["label"],
                "budget": f"{p['budget']:g}",
                "bytes held": f"{p['share']:.1%}",
                "n": p["n"],
                "score": f"{p['score']:.{digits}f}",
                "full": f"{p['full']:.{digits}f}",
                "difference": _difference(p),
                "retained": "" if pd.isna(p["retained"]) else f"{p['retained']:.0%}",
                "worst subset": f"{p['worst']} {p['worst_difference']:+.{digits}f}",
                "lost/won": f"{p['lost']}/{p['won']}",
                "p (Holm)": f"{p['p_holm']:.3f}",
                "note": ", ".join(
                    word
                    for word, said in (
                        ("front", p["front"]),
                        ("simulated", p["simulated"]),
                        ("near chance", p["near_chance"]),
                    )
                    if said
                ),
            }
        )
    return pd.DataFrame(rows)


def _difference(p: pd.Series) -> str:
    if p["method"] == "full":
        return ""
    text = f"{p['difference']:+.{p['digits']}f} [{p['difference_low']:+.{p['digits']}f}, "
    text += f"{p['difference_high']:+.{p['digits']}f}]"
    return text + " tie" if p["tie"] else text


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; bars in a cell are escaped."""
    head = list(table.columns)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(str(v).replace("|", "\\|") for v in row) + " |" for row in table.itertuples(index=False)
    ]
    return "\n".join(lines) + "\n"


def areas(table: pd.DataFrame, low: float | None = None) -> pd.DataFrame:
    """One number per curve: the mean best score over shares from `low` (the smallest one measured) to 1."""
    rows = []
    whole = table[(table["category"] == WHOLE) & ~table["simulated"] & ~table["near_chance"]]
    for (model, task, protocol), group in whole.groupby(["model", "task", "protocol"]):
        start = low or max(0.01, float(group["share"].min()))
        higher = group["better"].iloc[0] == "higher"
        for label, line in curves(group):
            value = stats.area(line["share"].to_numpy(), line["score"].to_numpy(), start, higher)
            rows.append(
                {"model": model, "task": task, "protocol": protocol, "method": label, "from": start, "area": value}
            )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m analysis.frontier", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--x", choices=AXES, default="held", help="what the horizontal axis shows")
    parser.add_argument("--linear", action="store_true", help="a linear horizontal axis instead of a logarithmic one")
    parser.add_argument("--out", type=Path, help="folder for the files (default: RESULTS)")
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
        table = chosen(points(results, given.x), given.task, given.model)
        for problem in results.problems:
            print(problem, file=sys.stderr)
        figure = draw(table, given.x, log=not given.linear)
    except NothingToRead as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2
    out = given.out or given.results
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(out / f"frontier.{kind}")
    table.drop(columns="cells").to_csv(out / "frontier.csv", index=False)
    lines = summary(table)
    (out / "frontier.md").write_text(markdown(lines))
    (out / "frontier.tex").write_text(lines.to_latex(index=False, escape=True))
    print(f"{len(table[table['category'] == WHOLE])} points of {table['task'].nunique()} tasks in {out}/frontier.*")
    return 0


def chosen(table: pd.DataFrame, tasks: list[str] | None, models: list[str] | None) -> pd.DataFrame:
    """The rows of some tasks and models. Raises NothingToRead naming what there is when none is left."""
    for column, names in (("task", tasks), ("model", models)):
        if names is None or table.empty:
            continue
        left = table[table[column].isin(names)]
        if left.empty:
            raise NothingToRead(f"--{column} {' '.join(names)}: there is {', '.join(sorted(table[column].unique()))}")
        table = left
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    return table


if __name__ == "__main__":
    sys.exit(main())
