"""Make a committed table from scratch: `python benchmarks/tables.py separation|core|frontier-mini`.

Runs the sweeps of conf/experiment that belong to the table (what is on disk is not run again), writes
benchmarks/NAME.json, its picture benchmarks/NAME.png, and the README's table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
#: the sweeps behind each table
SWEEPS = {"separation": ["separation", "protocols"], "core": ["core", "core-bits"], "frontier-mini": ["frontier-mini"]}


def main() -> int:
    """The exit code of the first step that fails, else 0; failed samples (1) do not stop the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--results", type=Path, help="folder of the records (default: results/NAME)")
    parser.add_argument("overrides", nargs="*", help="for run.py, such as task.limit=5")
    given = parser.parse_args()
    results = given.results or HOME / "results" / given.name
    for sweep in SWEEPS[given.name]:
        run = [sys.executable, "run.py", f"experiment={sweep}", f"results={results}", *given.overrides]
        code = subprocess.run(run, cwd=HOME, check=False).returncode
        if code not in (0, 1):
            return code
    said = " ".join(["python benchmarks/tables.py", given.name, *given.overrides])
    for module in (
        ["analysis.tables", str(results), "--name", given.name, "--command", said, "--readme"],
        ["analysis.frontier", str(results), "--out", str(results)],
    ):
        code = subprocess.run([sys.executable, "-m", *module], cwd=HOME, check=False).returncode
        if code:
            return code
    (HOME / "benchmarks" / f"{given.name}.png").write_bytes((results / "frontier.png").read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
