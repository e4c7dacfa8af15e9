"""The documents' tables: `python -m analysis.tables --pages` writes them again from benchmarks/results/*.json.

`python -m analysis.tables RESULTS --name NAME --command COMMAND` makes such a file from the records below RESULTS: the
points of all whole tasks, the commits and conditions behind them, and the command; and beside it NAME.parquet, every
sample's score and bytes, which the other commands read in the place of RESULTS. In README.md and the pages of docs/ a
table stands between `<!-- table: NAME -->` and `<!-- end -->`; the one called methods is made from conf/method and the
docstrings there. A picture stands between `<!-- figure: NAME -->` and `<!-- end -->`, which are left alone until its
file is there.
"""

import argparse
import ast
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.command import Command
from analysis.fidelity.panel import COLOURS
from analysis.files import given_path, whole, write
from analysis.frontier import markdown
from analysis.load import NothingToRead, Results, load_results
from analysis.pages.fidelity import has_panels
from analysis.points import WHOLE, points

HOME = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<head><!-- (?P<kind>table|figure): (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.S)
ADVICE = "the earlier files are as they were; make room, or let it be written"
#: what an interval says of a claim
VERDICTS = HELD, NOT_HELD, OPEN = "held", "not held", "cannot be told here"
KEPT = [
    "model", "task", "protocol", "label", "family", "simulated", "budget", "bits", "n", "seeds", "share", "bytes",
    "score", "score_low", "score_high", "full", "difference", "difference_low", "difference_high", "tie", "retained",
    "lost", "won", "p_holm", "worst", "worst_difference", "near_chance", "better", "unit", "metric", "digits",
]  # fmt: skip
READS = ["binds", "read"]  # where a budget is for what is read
FIDELITY = [
    "fidelity", "kl", "kl_low", "kl_high", "agree", "clear_flips", "shared_prefix", "identical", "out_ratio",
    "n_forced", "n_free",
]  # fmt: skip


def snapshot(results: Results, command: str, expected: dict[str, str] | None = None) -> dict[str, Any]:
    """What of the records is worth committing, ready for JSON.

    expected: by method, what its paper claims; every point of the method carries it.
    """
    table = points(results)
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    kept = [*KEPT, *(FIDELITY if has_panels(table) else []), *(READS if (table["binds"] == "read").any() else [])]
    whole = table[table["category"] == WHOLE][kept].sort_values(["task", "protocol", "label", "budget"])
    rows = json.loads(whole.to_json(orient="records", double_precision=5))
    for row in rows if expected else ():
        row["expected"] = (expected or {}).get(row["label"].split()[0], "")
    conditions = sorted({json.dumps(c, sort_keys=True) for cell in results.cells["conditions"] for c in cell})
    return {
        "command": command,
        "commits": sorted(set(results.cells["commit"])),
        "weights": sorted(set(results.cells["weights"])),
        "conditions": [json.loads(c) for c in conditions],
        "problems": results.problems,
        "points": rows,
    }


def grid(book: dict[str, Any]) -> str:
    """One line per method and budget, one column per task: the score, and the interval of the difference to full.

    A score that is no more than noise away from the full cache's is bold; what is wrong with its answers
    stands behind it. What a method's paper claims stands in its first line.
    """
    table = pd.DataFrame(book["points"])
    if "bits" not in table:
        table["bits"] = ""
    table["column"] = table["task"] + table["protocol"].map(lambda p: "" if p == "aware" else f", {p}")
    columns = list(dict.fromkeys(table["column"]))
    lines = []
    most = table.groupby("column")["n"].max()
    methods = sorted(set(table["label"]) - {"full"})
    for label in (["full"] if "full" in set(table["label"]) else []) + methods:
        of_label = table[table["label"] == label]
        budgets = of_label.groupby(["budget", "bits"])["share"].mean().sort_index(ascending=False)
        for i, (budget, bits) in enumerate(budgets.sort_values(ascending=False, kind="stable").index):
            point = of_label[(of_label["budget"] == budget) & (of_label["bits"] == bits)].set_index("column")
            line = {
                "method": label + (" (simulated)" if point["simulated"].any() else ""),
                "budget": bits or f"{budget:g}",
                "bytes held": f"{point['share'].mean():.1%}" + _read(point),
            }
            line |= {c: _entry(point.loc[c], most[c]) if c in point.index else "" for c in columns}
            if "expected" in point:
                line["the paper's claim"] = point["expected"].iloc[0] if i == 0 else ""
            lines.append(line)
    return markdown(pd.DataFrame(lines))


def claimed(book: dict[str, Any]) -> str:
    """One line per claim: what was measured for it, with intervals, and what the comparisons say, three verdicts."""
    lines = []
    for claim in book["claims"]:
        rows = claim["rows"]
        counts = Counter(row["verdict"] for row in rows)
        said = [f"{verdict} in {counts[verdict]} of {len(rows)}" for verdict in VERDICTS if counts[verdict]]
        verdict = next(iter(counts)) if len(counts) == 1 else ", ".join(said)
        line = {"method": f"`{claim['method']}`", "the paper's claim, in kind": claim["claim"]}
        lines.append(line | {"measured here": "; ".join(map(_measured, rows)), "verdict": verdict})
    return markdown(pd.DataFrame(lines))


def _measured(row: dict[str, Any]) -> str:
    digits = 3 if row["unit"].startswith("nats") else 1
    sign = "" if row["unit"] == "%" else "+"
    numbers = " to ".join(f"{row[key]:{sign}.{digits}f}" for key in ("low", "high"))
    seeds = f", {row['seeds']} seeds" if row.get("seeds", 1) > 1 else ""
    return f"{row['what']}: {row['value']:{sign}.{digits}f}{' %' if row['unit'] == '%' else ''} ({numbers}{seeds})"


def _read(points: pd.DataFrame) -> str:
    if "binds" not in points or points["binds"].iloc[0] != "read":
        return ""
    return f", {points['read'].mean():.1%} read"


def _entry(point: pd.Series, most: int) -> str:
    if point["n"] < most:
        return f"stopped after {point['n']}"  # such as a missed budget
    digits = 1 if point["better"] == "higher" else min(3, int(point["digits"]))
    score = f"{point['score']:.{digits}f}"
    if point["label"] == "full":
        return score + (" (near chance)" if point["near_chance"] else "")
    coarse = max(0, digits - 1)
    ends = [f"{point[end]:+.{coarse}f}" for end in ("difference_low", "difference_high")]
    interval = "-" if pd.isna(point["difference_low"]) else ", ".join(ends)
    label = f" {point['fidelity']}" if point.get("fidelity") in COLOURS else ""
    return f"{f'**{score}**' if point['tie'] else score} ({interval}){label}"


def pages() -> list[Path]:
    """Files of the checkout that may hold marked tables and figures."""
    return [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]


def fill(text: str, folder: Path, page_folder: Path = HOME) -> str:
    """A text with every marked table made again from folder/NAME.json. Raises NothingToRead naming a missing file.

    A figure's picture and source are named once its file is there; its link leads from page_folder to the picture.
    """

    def filled_table(match: re.Match[str]) -> str:
        name, head, end = match["name"], match["head"], match["end"]
        if name == "methods":
            return f"{head}\n{methods(HOME)}\n{end}"
        path = folder / f"{name}.json"
        if match["kind"] == "figure" and not path.exists():
            return match[0]
        if not path.exists():
            raise NothingToRead(f"{path}: no such file; python -m analysis.tables RESULTS --name {name} makes it")
        book = json.loads(path.read_text(encoding="utf-8"))
        if "claims" in book:
            return f"{head}\n{claimed(book)}\n`{book['command']}`\n\n{end}"
        said = f"`{book['command']}`, n = {_counts(book['points'])}\n"
        if match["kind"] == "figure":
            link = Path(os.path.relpath(HOME / "benchmarks" / "results" / f"{name}.png", page_folder)).as_posix()
            picture = f"![score against measured bytes]({link})"
            said = f"{said[:-1]}; every sample behind it: `benchmarks/results/{name}.parquet`\n"
            return f"{head}\n{picture}\n\n{said}\n{end}"
        return f"{head}\n{grid(book)}\n{said}\n{end}"

    return BLOCK.sub(filled_table, text)


def methods(home: Path) -> str:
    """Every method that can be named, what it does and its paper: from its YAML and its module's docstring."""
    lines = []
    for path in sorted((home / "conf" / "method").glob("*.yaml")):
        target = _target(path)
        module = home / Path(*target.split(".")[:-1]).with_suffix(".py")
        said = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        what = said.split("\n\n")[0].replace("\n", " ").partition(": ")
        paper = re.search(r"^Paper: +(.*?)(?=\n\S|\Z)", said, re.M | re.S)
        source = re.sub(r"\s+", " ", paper[1]).rstrip(".") if paper else ""
        text = path.read_text(encoding="utf-8")
        does = what[2] or what[0]
        if "\nreference: true" in text and text.startswith("# "):  # a setting of another's, which says what it is
            does = text.partition("\n")[0].removeprefix("# ")
        # a name with a plus is a combination; else a file over another only saves words
        if "+" in path.stem and (
            based := re.search(r"^defaults: *\[(\S+),.*?^store: *\{_target_: *methods\.(\w+)", text, re.M | re.S)
        ):
            does = f"`{based[1]}`, its slots stored as in `{based[2]}`"
        lines.append({"method": f"`{path.stem}`", "what it does": does, "paper": source})
    return markdown(pd.DataFrame(lines))


def _target(path: Path) -> str:
    """The class that a YAML names, or the one of the YAML that it starts from."""
    text = path.read_text(encoding="utf-8")
    if allocator := re.search(r"^allocator:[\s{]*_target_: *([^\s,}]+)", text, re.M):
        return allocator[1]  # a paper of its own, on top of another's scores
    if target := re.search(r"^_target_: *(\S+)", text, re.M):
        store = re.search(r"^store: *\{_target_: *([^\s,]+)", text, re.M)
        return store[1] if store and target[1].startswith("methods.core.") else target[1]
    base = re.search(r"^defaults: *\[(\S+),", text, re.M)
    assert base, f"{path} names no class"
    return _target(path.with_name(f"{base[1]}.yaml"))


def _counts(rows: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["task"]] = max(row["n"], counts.get(row["task"], 0))
    return ", ".join(f"{n} ({task})" for task, n in counts.items())


def options(parser: argparse.ArgumentParser) -> None:
    """What only this command takes."""
    parser.add_argument("--name", help="of the file and of the table")
    parser.add_argument("--command", default="", help="what made the records, for the reader")
    parser.add_argument("--expected", type=given_path, help="YAML with what each method's paper claims")
    parser.add_argument(
        "--pages", "--readme", action="store_true", help="write the tables of README.md and docs/ again"
    )


def run(given: argparse.Namespace) -> int:
    """Make what was asked for. Raises NothingToRead and CannotWrite."""
    if (given.results is None) != (given.name is None) or not (given.results or given.pages):
        given.refuse("give RESULTS with --name, or --pages, or both")
    folder = HOME / "benchmarks" / "results"
    if given.results:
        expected = _expected(given) if given.expected else None
        results = load_results(given.results, given.all_generations)
        book = snapshot(results, given.command, expected)
        for problem in results.problems:
            print(problem, file=sys.stderr)
        path = folder / f"{given.name}.json"
        with whole(path.with_suffix(".parquet"), ADVICE) as draft:
            results.pack(draft)
        write(path, json.dumps(book, indent=1) + "\n", advice=ADVICE)
        print(f"{len(book['points'])} points in {path}, and the samples behind them in {path.stem}.parquet")
    if given.pages:
        texts = {page: page.read_text(encoding="utf-8") for page in pages()}
        filled = {page: fill(text, folder, page.parent) for page, text in texts.items()}  # all, or none is touched
        for page in pages():
            if filled[page] != texts[page]:
                write(page, filled[page], advice=ADVICE)
    return 0


def _expected(given: argparse.Namespace) -> dict[str, str]:
    """What --expected holds; refused where that is no mapping."""
    try:
        claims = yaml.safe_load(given.expected.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        given.refuse(f"--expected={given.expected}: cannot be read ({' '.join(str(error).split())})")
    if not isinstance(claims, dict):
        given.refuse(f"--expected={given.expected}: needs lines of `method: what its paper claims`")
    return claims


main = Command(
    "tables", __doc__ or "", run, options, results="records to make benchmarks/results/NAME.json from"
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
