"""The points of a frontier as LaTeX tables (booktabs) that fit one column of a two-column paper."""

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.paired import WHOLE

#: tasks side by side in \\footnotesize; more go into further tables below
ACROSS = 2
NAME = "5.4em"  # width of the methods' column; longer names take several lines
HEADING = 11  # letters of a line of a task's name


def tables(table: pd.DataFrame) -> str:
    """Lines per method and budget, columns per task; below a score, the interval of its difference to the full cache.

    Ties with the full cache are bold. Scores of 100 have one decimal, losses two; the
    ends of intervals one fewer.
    """
    whole = table[(table["category"] == WHOLE) & ~table["near_chance"]]
    columns = whole[["model", "task", "protocol"]].drop_duplicates().sort_values(["model", "task", "protocol"])
    keys = list(columns.itertuples(index=False, name=None))
    parts = [_tabular(whole, keys[at : at + ACROSS]) for at in range(0, len(keys), ACROSS)]
    if whole["simulated"].any():
        parts.append("% * the saving is simulated\n")
    return "\n".join(parts)


def _tabular(whole: pd.DataFrame, keys: Sequence[tuple[str, str, str]]) -> str:
    several = whole["model"].nunique() > 1
    heads = [_heading(f"{m}, {t}" if several else t, p) for m, t, p in keys]
    layout = f"@{{}}p{{{NAME}}}rr{'r' * len(heads)}@{{}}"
    lines = [
        r"{\footnotesize\setlength{\tabcolsep}{2pt}" + rf"\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        " & ".join(["method", "budget", "bytes", *heads]) + r" \\",
        r"\midrule",
        *_lines(whole, keys),
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    return "\n".join(lines) + "\n"


def _lines(whole: pd.DataFrame, shown: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    keys = pd.Series(list(zip(whole["model"], whole["task"], whole["protocol"])), index=whole.index)
    here = whole[keys.isin(shown)]
    order = here.assign(first=here["method"] != "full").sort_values(["first", "label", "share"])
    for (label, _, _), group in order.groupby(["label", "budget", "bits"], sort=False):
        p = group.iloc[0]
        entries = {(row["model"], row["task"], row["protocol"]): _entry(row) for _, row in group.iterrows()}
        name = r"\raggedright " + escaped(label) + (r"\textsuperscript{*}" if p["simulated"] else "")
        cells = [name, escaped(p["bits"] or f"{p['budget']:g}"), escaped(f"{group['share'].mean():.1%}")]
        yield " & ".join([*cells, *(entries.get(key, ("", ""))[0] for key in shown)]) + r" \\"
        if p["method"] != "full":
            yield " & ".join(["", "", "", *(entries.get(key, ("", ""))[1] for key in shown)]) + r" \\"


def _entry(p: pd.Series) -> tuple[str, str]:
    """The score, and below it the interval of the difference."""
    higher = p["better"] == "higher"
    digits = min(1 if higher else 2, int(p["digits"]))
    score = f"{p['score']:.{digits}f}"
    coarse = max(0, digits - 1)
    ends = [f"{p[end]:+.{coarse}f}".replace("-", "$-$") for end in ("difference_low", "difference_high")]
    below = "--" if pd.isna(p["difference_low"]) else f"({', '.join(ends)})"
    return rf"\textbf{{{score}}}" if p["tie"] else score, rf"{{\scriptsize {below}}}"


def _heading(task: str, protocol: str) -> str:
    """A task's name in short lines."""
    words = re.findall(r"[^-_, ]+[-_,]? ?", task) + ([] if protocol == "aware" else [f"({protocol})"])
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word.strip()) > HEADING:
            lines.append("")
        lines[-1] += word
    shown = r"\\".join(escaped(line.strip()) for line in lines)
    return rf"\shortstack[r]{{{shown}}}"


def escaped(text: str) -> str:
    """Any text as LaTeX prints it, on one line."""
    text = " ".join(text.split())
    for sign in ("\\", "&", "%", "$", "#", "_", "{", "}"):
        text = text.replace(sign, r"\textbackslash " if sign == "\\" else f"\\{sign}")
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
