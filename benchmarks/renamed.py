"""Whether two trees compute the same: `python benchmarks/renamed.py COMMIT` after nothing but names and places changed.

Runs the committed experiments again in this checkout, up to --limit samples per subset, and compares every sample's
score and bytes with benchmarks/results/NAME.parquet. Where all are the same, runners/records/renamed.json gets COMMIT's
tree, and this one as its last: records that COMMIT's code made are then this code's. `--keep-trees` keeps those listed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
from analysis.load import load_results  # noqa: E402
from runners.records.renamed import TABLE  # noqa: E402

EXPERIMENTS = ("core", "separation", "frontier-mini")
#: what tells one cell from another, whatever code answered it
CELL = ["model", "task", "protocol", "method", "budget", "seed", "config", "passes", "fingerprint"]
SAMPLE = ["id", "measure"]
SAME = ["score", "error", "tokens_in", "tokens_out", "bytes", "bytes_full", "read"]
#: the hashes of every module of a tree, by the tree's own way of hashing
HASHES = """
import json, subprocess
from methods.core import home
from runners.records.provenance import code_of
files = subprocess.run(["git", "ls-files", *home.FOLDERS], capture_output=True, text=True, check=True).stdout.split()
names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files if path.endswith(".py")]
print(json.dumps(sorted(set(code_of(names).modules.values()))))
"""


def modules(tree: Path) -> list[str]:
    """The hashes of a checkout's modules."""
    told = subprocess.run([sys.executable, "-c", HASHES], cwd=tree, capture_output=True, text=True, check=True)
    return [str(one) for one in json.loads(told.stdout)]


def earlier(commit: str) -> list[str]:
    """The hashes of a commit's modules."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-q", "--detach", folder, commit], cwd=HOME, check=True)
        try:
            return modules(Path(folder))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=HOME, check=True)


def samples(results: Path) -> pd.DataFrame:
    """Every sample of some records, known by what was asked; of several cells that answer the same, one."""
    read = load_results(results)
    cells = read.cells[["cell", *CELL]].reset_index(drop=True)
    table = read.samples.merge(cells, on="cell", validate="many_to_one")
    table = table.drop_duplicates([*CELL, *SAMPLE]).set_index([*CELL, *SAMPLE])
    return table[SAME].round(5).sort_index()


def differing(name: str, results: Path, limit: int) -> tuple[int, pd.DataFrame]:
    """How many samples of an experiment were measured again, and those that are not as they are committed.

    Raises SystemExit where a committed cell was not measured again: a method that cannot run is none that agrees.
    """
    run = [sys.executable, "benchmarks/tables.py", name, f"--results={results}", "--only=experiment"]
    subprocess.run([*run, f"task.limit={limit}"], cwd=HOME, check=False)
    new, old = samples(results), samples(HOME / "benchmarks" / "results" / f"{name}.parquet")
    cells = [table.index.droplevel(SAMPLE).unique() for table in (old, new)]
    if len(missing := cells[0].difference(cells[1])):
        raise SystemExit(f"{name}: {len(missing)} cells were not measured again, such as {missing[0]}")
    both = new.join(old.add_suffix("_committed"), how="inner")
    committed = both[[f"{column}_committed" for column in SAME]].set_axis(SAME, axis="columns")
    same = both[SAME].eq(committed) | (both[SAME].isna() & committed.isna())
    return len(both), both[~same.all(axis="columns")]


def main() -> int:
    """0 if every sample is as it is committed, and the table is written; 1 if one is not, 2 if none was compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commit", help="the tree that records were made with")
    parser.add_argument("--limit", type=int, default=2, help="samples per subset that are measured again")
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="which of them, with commas")
    parser.add_argument("--results", type=Path, help="folder of the new records (default: one that is deleted)")
    parser.add_argument("--keep-trees", action="store_true", help="add to the trees that are listed already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = {}
        for name in given.experiments.split(","):
            compared[name], wrong = differing(name, (given.results or Path(folder)) / name, given.limit)
            print(f"{name}: {compared[name]} samples measured again, {len(wrong)} are not as committed", flush=True)
            if len(wrong):
                print(wrong.head(20).to_string())
                return 1
            if not compared[name]:
                return 2
    listed = json.loads(TABLE.read_text(encoding="utf-8"))["trees"][:-1] if given.keep_trees else []
    trees = [*listed, {"commit": given.commit, "modules": earlier(given.commit)}]
    now = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HOME, capture_output=True, text=True, check=True).stdout
    trees.append({"commit": now.strip()[:12], "modules": modules(HOME)})
    TABLE.write_text(json.dumps({"compared": compared, "trees": trees}, indent=0) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
