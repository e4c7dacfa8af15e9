"""Make a committed table from scratch: `python benchmarks/tables.py separation|core|frontier-mini`.

Runs the sweeps that belong to the table (what is on disk is not run again), writes results/NAME.json, its picture
results/NAME.png, and its table in the documents. `--only WORD` runs those sweeps only that have the word, such as
`--only perplexity`, and makes nothing of them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

HOME = Path(__file__).resolve().parent.parent
EXPECTED = {"core": HOME / "benchmarks" / "expected.yaml"}
#: methods that draw at random, and the seeds that each of them is run with
RANDOM, SEEDS = ("keyformer", "nacl", "random"), (0, 1, 2)
#: texts per subset of perplexity-mini, which is read token by token and not shared between cells
TEXTS = "task.limit=6"


def sweeps(name: str) -> list[list[str]]:
    """The overrides of every sweep behind a table."""
    if name == "separation":
        return [["experiment=separation"], reseeded("experiment=separation"), ["experiment=protocols"]]
    if name == "frontier-mini":
        return [["experiment=frontier-mini"], reseeded("experiment=frontier-mini")]
    core = [["experiment=core"], reseeded("experiment=core")]
    shared = [*core, ["experiment=core-bits"], *searched("experiment=core-bits")]
    fused = ["experiment=core-fused"]
    return [*shared, *([*part, "task=perplexity", TEXTS] for part in [*shared, fused]), fused]


def reseeded(sweep: str) -> list[str]:
    """The same sweep of the methods that draw at random, with the seeds that it has not."""
    grid = yaml.safe_load(
        (HOME / "conf" / "experiment" / f"{sweep.partition('=')[2]}.yaml").read_text(encoding="utf-8")
    )
    methods = grid["hydra"]["sweeper"]["params"]["method"].split(",")
    random = [method for method in RANDOM if method in methods or methods == ["glob(*)"]]
    return [sweep, f"method={','.join(random)}", f"seed={','.join(map(str, SEEDS[1:]))}"]


def searched(sweep: str) -> list[list[str]]:
    """The same sweep with the tables that were searched for the reference model instead of bits."""
    commands = []
    for method, mode in (("kvtuner", "kivi"), ("kvtuner_per_token", "per_token")):
        folder = HOME / "assets" / "kvtuner" / "reference" / mode
        if tables := sorted(path.stem for path in folder.glob("*.yaml")):
            commands.append([sweep, f"method={method}", f"method.table={','.join(tables)}", "method.bits=null"])
    return commands


def main() -> int:
    """The exit code: of the last sweep that could not run, or of making the table; failed samples (1) count as run.

    A table is made of what there is: a method that cannot run stops no other.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=("separation", "core", "frontier-mini"))
    parser.add_argument("--results", type=Path, help="folder of the records (default: outputs/NAME)")
    parser.add_argument("--only", metavar="WORD", help="run the sweeps that have this word, and stop there")
    parser.add_argument("overrides", nargs="*", help="for run.py, such as task.limit=5")
    given = parser.parse_intermixed_args()  # overrides may stand behind options
    results = given.results or HOME / "outputs" / given.name  # not below results/, whose analysis would read them too
    refused = 0
    for sweep in sweeps(given.name):
        if given.only and given.only not in " ".join(sweep):
            continue
        run = [sys.executable, "run.py", "-m", *sweep, f"results={results}", *given.overrides]
        code = subprocess.run(run, cwd=HOME, check=False).returncode
        if code < 0:  # a signal, such as Ctrl-C's
            return code
        refused = code if code > 1 else refused
    if given.only:
        return refused
    said = " ".join(["python benchmarks/tables.py", given.name, *given.overrides])
    expected = ["--expected", str(EXPECTED[given.name])] if given.name in EXPECTED else []
    for module in (
        ["analysis.tables", str(results), "--name", given.name, "--command", said, *expected, "--pages"],
        ["analysis.frontier", str(results), "--out", str(results)],
    ):
        code = subprocess.run([sys.executable, "-m", *module], cwd=HOME, check=False).returncode
        if code:
            return code
    (HOME / "benchmarks" / "results" / f"{given.name}.png").write_bytes((results / "frontier.png").read_bytes())
    return refused


if __name__ == "__main__":
    sys.exit(main())
