"""What is a score worth? `python -m analysis.audit RESULTS` compares methods with a die under the same pins.

For every method, budget and task: W, the score less random under the same pins, with its paired interval; the same
against recency; what the pins are worth by themselves; and, where both protocols are there, what seeing the question is
worth.
docs/audit.md says how the cells are made: `python run.py experiment=audit`.
"""

from __future__ import annotations

import argparse
import sys
import textwrap

import pandas as pd

from analysis import style
from analysis.audit.figure import draw
from analysis.audit.frames import frames
from analysis.audit.worth import others, table, visibility
from analysis.command import RESULTS, Command
from analysis.files import check_out, write, write_csv
from analysis.frontier import chosen, markdown, show
from analysis.load import NothingToRead, load_results


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")


def run(given: argparse.Namespace) -> int:
    """Compare, print, draw and write. Raises NothingToRead and CannotWrite."""
    check_out(given.out, is_file=False)
    results = load_results(given.results, given.all_generations)
    found = list(frames(results))
    numbers = table(found)
    if numbers.empty:
        raise NothingToRead(
            "no method with its score and with method.score_by=random under the same pins; experiment=audit makes both"
        )
    numbers = chosen(numbers, given.task, given.model)
    for problem in dict.fromkeys(results.problems):
        print(problem, file=sys.stderr)
    parts = []
    for values, rows in numbers.groupby(["model", "task", "protocol"], sort=False):
        told = [
            ("W: the score less random under the same pins", _worth(rows)),
            ("Pins by themselves", others(rows)),
        ]
        parts.append((", ".join(map(str, values)), [(title, part) for title, part in told if len(part)]))
    places = set(zip(numbers["model"], numbers["task"]))
    seen = visibility([one for one in found if (one.key["model"], one.key["task"]) in places])
    if len(seen):
        parts.append(("query_aware less query_agnostic", [("What seeing the question is worth", seen)]))
    for heading, tables in parts:
        print(f"\n{heading}")
        for title, part in tables:
            print(f"\n{title}")
            show(part, given.markdown)
    print()
    for line in _told(numbers):
        print(textwrap.fill(line, 79, subsequent_indent="  "))
    out = given.out or (given.results if given.results.is_dir() else given.results.parent)
    style.save(draw(numbers), out / "audit")
    write_csv(out / "audit.csv", numbers)
    text = [
        f"## {heading}\n\n" + "\n".join(f"{title}\n\n{markdown(part)}" for title, part in tables)
        for heading, tables in parts
    ]
    write(out / "audit.md", "\n".join([*text, *_told(numbers)]) + "\n")
    print(f"{len(numbers)} comparisons in {out}/audit.*")
    return 0


def _worth(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as texts, for the screen."""
    return pd.DataFrame([
        {
            "method": row["method"], "budget": f"{row['budget']:g}", "pin": row["pin"], "n": str(row["n"]),
            "score": f"{row['score']:.{row['digits']}f}", "random": f"{row['random']:.{row['digits']}f}",
            "W": row["W_text"], "verdict": row["verdict"], "p (Holm)": row["p_text"],
            "smallest": row["smallest_text"], "over recency": row["recency_text"], "of the gap": row["gap_text"],
            "allocation": row["allocation_text"], "selection": row["selection_text"],
        }
        for _, row in rows.iterrows()
    ]).pipe(_without_empty)  # fmt: skip


def _without_empty(told: pd.DataFrame) -> pd.DataFrame:
    """Without columns that say nothing in any row."""
    return told[[name for name in told if (told[name] != "").any()]]


def _told(numbers: pd.DataFrame) -> list[str]:
    """How the nulls were drawn, and what their numbers are worth."""
    seeds = sorted(set(numbers["seeds"]))
    lines = [
        f"random: {', '.join(sorted(set(numbers['draw'])))} numbers, drawn per layer and KV head; "
        f"{' or '.join(map(str, seeds))} seeds, averaged in a sample; their means spread by up to "
        f"{numbers['spread'].max():.2f} (standard deviation).",
        "smallest: half of W's interval, the smallest worth that could be told from chance here.",
    ]
    if min(seeds) < 5:
        lines.append("Fewer than 5 seeds: one draw differs from another by as much as methods do. Give seed=0,1,2,3,4.")
    if (uneven := numbers[numbers["verdict"].str.startswith("void")]).any(axis=None):
        lines.append(f"{len(uneven)} comparisons are void: the two sides hold different bytes.")
    return lines


main = Command(
    "audit", __doc__ or "", run, options, "a results folder, or a file of analysis.tables", default=RESULTS,
    out="folder of audit.png, .svg, .csv and .md; the results folder", markdown=True,
).main  # fmt: skip
