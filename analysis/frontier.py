"""Accuracy against memory: `python -m analysis.frontier RESULTS` draws the frontiers of all records below a folder.

Writes frontier.png, .svg and .pdf (a panel per task), frontier.csv, frontier.md and frontier.tex. A curve's points
are a method's cells; the black line is the full cache with its interval, the dotted one what is right without the text;
hollow points only simulate their saving, or hold more than their budget in more than a tenth of their samples; the wide
grey line is the front, which no point beats. Methods whose budget is for what they read are drawn on that axis alone
(--x read, or frontier-read.*). Where answers' tokens are recorded, fidelity.png, .svg and .pdf draw how far they are
from the full cache's.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import screen, stats, style
from analysis.area import areas
from analysis.command import Command
from analysis.files import check_out, one_line, write, write_csv
from analysis.load import NothingToRead, Results, load_results
from analysis.pages import latex
from analysis.pages.fidelity import draw, has_panels
from analysis.paired import KEYS, WHOLE
from analysis.points import AXES, FLOOR, curves, on_front, points

AXIS_NAMES = {
    "held": "share of the full cache's bytes held",
    "read": "share of the full cache's bytes read per step",
    "peak": "peak share of the full cache's bytes",
}
HEADS = {"held": "bytes held", "read": "bytes read", "peak": "peak bytes"}
BELOW: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": ":", "zorder": 1}
MISSED = 0.1  # share of samples above their budget from which on a point is drawn hollow
TICKS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
ENTRY, LETTER = 0.45, 0.055  # inches of a legend's entry, without its letters and for each of them


def draw_frontier(table: pd.DataFrame, x: str, log: bool = True, columns: int = 2, categories: bool = False) -> Any:
    """A matplotlib figure with one panel per task and protocol, or per category of them; table as `points` makes it."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    table = table[(table["category"] != WHOLE) if categories else (table["category"] == WHOLE)]
    table = table[~table["near_chance"] & ~table["off_axis"]]
    panels = list(table.groupby(["model", "task", "protocol", "category"], sort=True))
    if not panels:
        what = "no task has several categories" if categories else "no task has a full cache's score above chance"
        raise NothingToRead(f"nothing to draw: {what}")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    shown = table[~table["method"].isin(["full", FLOOR])]
    families = shown.groupby("label")["family"].first().to_dict()
    looks = style.looks(families)
    with plt.rc_context(style.RC):
        hollow = set(table[table["simulated"]]["label"])
        said = {label: f"{label} (simulated)" if label in hollow else label for label in looks}
        widest = ENTRY + LETTER * max(map(len, [*said.values(), "front"]))
        across = max(1, int(style.COLUMN * columns / widest))
        lines = -(-(len(looks) + 2) // across)
        size = (style.COLUMN * columns, 2.2 * rows + 0.15 * lines + 0.25)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        named, several = "", table["model"].nunique() > 1
        if not several:
            figure.suptitle(table["model"].iloc[0], fontsize=style.RC["axes.titlesize"])
        for panel, (axis, ((model, task, protocol, category), group)) in enumerate(zip(axes.flat, panels)):
            _panel(axis, group, looks, log)
            title = f"{task} ({protocol})" + ("" if category == WHOLE else f": {category}")
            if several:
                title = f"{model}\n{title}"
            axis.set_title("\n".join(textwrap.fill(part, 48) for part in title.split("\n")))
            measured = f"{group['metric'].iloc[0]}, {group['unit'].iloc[0]}"
            if panel % columns == 0 or measured != named:
                axis.set_ylabel(textwrap.fill(measured, 30))
            named = measured
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        for axis in list(axes.flat)[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel(AXIS_NAMES[x])
        handles = [Line2D([], [], color="black", lw=0.9, label="full"), Line2D([], [], **style.FRONT, label="front")]
        if (table["method"] == FLOOR).any():
            handles.append(Line2D([], [], **BELOW, label=FLOOR))
        for label, look in looks.items():
            handles.append(Line2D([], [], **style.line(look, label in hollow), label=said[label]))
        figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False)
    return figure


def _panel(axis: Any, group: pd.DataFrame, looks: dict[str, style.Look], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    full = group.iloc[0]
    if not pd.isna(full["full_low"]):
        axis.axhspan(full["full_low"], full["full_high"], color="black", alpha=0.08, lw=0, zorder=0)
    axis.axhline(full["full"], color="black", lw=0.9, zorder=1)
    front = group[on_front(group)].sort_values("share")
    axis.step(front["share"], front["score"], where="post", **style.FRONT)
    for score in group[group["method"] == FLOOR]["score"]:
        axis.axhline(score, **BELOW)
    for label, line in curves(group[~group["method"].isin(["full", FLOOR])]):
        low, high = line["score"] - line["score_low"], line["score_high"] - line["score"]
        drawn = style.line(looks[label], bool(line["simulated"].iloc[0]))
        bars = [low.clip(lower=0), high.clip(lower=0)]
        _, _, (bar,) = axis.errorbar(line["share"], line["score"], yerr=bars, **drawn, elinewidth=0.6, zorder=3)
        bar.set_alpha(0.55)
        missed = line[above_budget(line)]
        if len(missed):
            axis.plot(missed["share"], missed["score"], **style.line(looks[label], True) | {"linestyle": ""}, zorder=4)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(
            FixedLocator([t for t in TICKS if t >= 0.7 * group[group["method"] != FLOOR]["share"].min()])
        )
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.25, lw=0.4)
    axis.set_axisbelow(True)


def above_budget(table: pd.DataFrame) -> pd.Series:
    """Which points hold more than their budget for more than a tenth of their samples: they are drawn hollow."""
    return table["above"] > MISSED * table["n"]


def summary(table: pd.DataFrame, x: str = "held") -> pd.DataFrame:
    """The table for people: one row per point of a whole task, differences that are no more than noise as ties.

    x: of whose bytes the shares are, as in `points`.
    """
    whole = table[table["category"] == WHOLE].assign(front=on_front(table))
    rows = []
    for _, p in whole.sort_values(["model", "task", "protocol", "label", "share"]).iterrows():
        digits, full = p["digits"], p["method"] == "full"
        notes = [word for word in ("front", "simulated", "near_chance", "partial") if p[word]]
        notes += [f"reads {p['read']:.1%}"] if p["binds"] == "read" and x != "read" else []
        notes += [f"{p['above']} of {p['n']} above the budget"] if p["above"] else []
        rows.append(
            {
                **({"model": p["model"]} if table["model"].nunique() > 1 else {}),
                "task": p["task"],
                "protocol": p["protocol"],
                "method": p["label"],
                "budget": p["bits"] or f"{p['budget']:g}",
                HEADS[x]: f"{p['share']:.1%}",
                "n": p["n"],
                "score": f"{p['score']:.{digits}f}",
                "full": f"{p['full']:.{digits}f}",
                "difference": "" if full else _difference(p),
                "retained": "" if pd.isna(p["retained"]) else f"{p['retained']:.0%}",
                "worst subset": "" if full else f"{p['worst']} {p['worst_difference']:+.{digits}f}",
                "lost/won": "" if full or p["better"] == "lower" else f"{p['lost']}/{p['won']}",
                "p (Holm)": "" if full else stats.p_text(p["p_holm"]),
                **(_fidelity(p) if has_panels(table) else {}),
                "note": ", ".join(notes).replace("_", " "),
            }
        )
    return pd.DataFrame(rows)


def _fidelity(p: pd.Series) -> dict[str, str]:
    kl, agree = ("" if pd.isna(p[name]) else p[name] for name in ("kl", "agree"))
    return {
        "fidelity": p["fidelity"],
        "KL, nats": "" if kl == "" else f"{kl:.3g}",
        "same token": "" if agree == "" else f"{agree:.0%}",
    }


def _difference(p: pd.Series) -> str:
    text = f"{p['difference']:+.{p['digits']}f} {brackets(p['difference_low'], p['difference_high'], p['digits'])}"
    return text + " tie" if p["tie"] else text


def _area_interval(p: pd.Series) -> str:
    digits = p["digits"]
    return "-" if pd.isna(p["area_low"]) else f"{p['area_low']:.{digits}f} to {p['area_high']:.{digits}f}"


def brackets(low: float, high: float, digits: int) -> str:
    """A difference's interval, signs shown; [-] where there is none, as of a single sample."""
    return "[-]" if pd.isna(low) else f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; bars in a cell are escaped, and line breaks are blanks."""
    head = [_cell(name) for name in table.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return one_line(value).replace("|", "\\|")


def show(table: pd.DataFrame, as_markdown: bool = False) -> None:
    """Print a table of texts: as wide as the screen is, or as Markdown."""
    if as_markdown:
        print(markdown(table), end="")
        return
    names = [str(name) for name in table.columns]
    numbers = {name for name in names if re.match(r"[-+<]?\d", str(table[name].iloc[0]))}
    shown = screen.new_table(*names, left=[name for name in names if name not in numbers])
    for row in table.itertuples(index=False):
        shown.add_row(*map(str, row))
    screen.print_table(shown)


def page(table: pd.DataFrame, under: pd.DataFrame, x: str = "held") -> str:
    """frontier.md: the tasks' points, the areas under their frontiers, and apart from them what is near chance."""
    lines = summary(table[~table["near_chance"]], x) if not table["near_chance"].all() else pd.DataFrame()
    parts = [markdown(lines)] if len(lines) else []
    if len(under):
        shown = under[["model", "task", "protocol", "method", "n"]].assign(
            **{
                "from": [f"{share:.1%}" for share in under["from"]],
                "area": [f"{p['area']:.{p['digits']}f}" for _, p in under.iterrows()],
                "95 % interval": [_area_interval(p) for _, p in under.iterrows()],
            }
        )
        shown = shown.sort_values(["model", "task", "protocol"], kind="stable")
        parts += ["Area under the frontier: the mean best score over the shares of bytes from `from` to 1, on a "
                  "logarithmic axis.\n", markdown(shown)]  # fmt: skip
    if table["near_chance"].any():
        parts += ["Near chance with the full cache, so that no method can lose anything:\n",
                  markdown(summary(table[table["near_chance"]], x))]  # fmt: skip
    return "\n".join(parts)


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--x", choices=AXES, default="held", help="what the horizontal axis shows")
    parser.add_argument("--linear", action="store_true", help="a linear horizontal axis instead of a logarithmic one")
    parser.add_argument("--by", choices=("task", "category"), default="task", help="what has a panel of its own")
    parser.add_argument("--columns", type=int, default=2, help="panels side by side, each as wide as a paper's column")


def run(given: argparse.Namespace) -> int:
    """Draw and write. Raises NothingToRead and CannotWrite."""
    check_out(given.out, is_file=False)
    results = load_results(given.results, given.all_generations)
    table = chosen(points(results, given.x), given.task, given.model)
    for problem in results.problems:
        print(problem, file=sys.stderr)
    figure = draw_frontier(table, given.x, not given.linear, max(1, given.columns), given.by == "category")
    out = given.out or (given.results if given.results.is_dir() else given.results.parent)
    marked = table.assign(front=on_front(table), family_front=on_front(table, "family"))
    style.save(figure, out / "frontier")
    if (panels := draw(table, "share", AXIS_NAMES[given.x])) is not None:
        style.save(panels, out / "fidelity")
    write_csv(out / "frontier.csv", marked.drop(columns=["cells", "full_cells"]))
    text = page(table, areas(results, table, given.x), given.x)
    if table["off_axis"].any():
        text += _draw_reads(results, given, table, out)
    write(out / "frontier.md", text)
    write(out / "frontier.tex", latex.tables(table))
    print(f"{len(table[table['category'] == WHOLE])} points of {table['task'].nunique()} tasks in {out}/frontier.*")
    return 0


def _draw_reads(results: Results, given: argparse.Namespace, table: pd.DataFrame, out: Path) -> str:
    """frontier-read.*: tasks of which some method's budget is for what it reads, on that axis; what the page says."""
    reads = points(results, "read")
    tasks = table[table["off_axis"]].groupby(KEYS).groups
    reads = reads[[tuple(key) in tasks for key in reads[KEYS].itertuples(index=False)]]
    if not reads["near_chance"].all():
        figure = draw_frontier(reads, "read", not given.linear, max(1, given.columns), given.by == "category")
        style.save(figure, out / "frontier-read")
    names = ", ".join(sorted(table[table["off_axis"]]["label"].unique()))
    return (
        f"\nBy bytes read, as the budget of {names} is for those (frontier-read.png); nothing of it is drawn by bytes "
        f"held:\n\n{page(reads, areas(results, reads, 'read'), 'read')}"
    )


def chosen(table: pd.DataFrame, tasks: list[str] | None, models: list[str] | None) -> pd.DataFrame:
    """The rows of some tasks and models. Raises NothingToRead naming what there is when none is left."""
    for column, names in (("task", tasks), ("model", models)):
        if names is None or table.empty:
            continue
        # a name as it is shown, or without what tells it from others of the name
        left = table[table[column].isin(names) | table[column].str.partition(" (")[0].isin(names)]
        if left.empty:
            raise NothingToRead(f"--{column} {' '.join(names)}: there is {', '.join(sorted(table[column].unique()))}")
        table = left
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    return table


main = Command(
    "frontier", __doc__ or "", run, options, results="a folder of records, or a file of them from benchmarks/",
    needed=True, out="folder for the files (default: RESULTS)",
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
