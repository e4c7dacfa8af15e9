"""The command `kvfrontier`: the checkout's `python run.py` and its analyses, by one name.

kvfrontier run method=nacl budget=0.5 task=longbench
kvfrontier model
kvfrontier frontier results
"""

import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata

from methods.core.home import here

NAME = "kvfrontier"
#: commands that read records, by the module whose `main` they are
ANALYSES = {
    "frontier": "analysis.frontier",
    "report": "analysis.report",
    "compare": "analysis.compare",
    "leaderboard": "analysis.leaderboard",
}
USAGE = f"""usage: {NAME} run SETTING=VALUE ...   as python run.py in a checkout; -m sweeps, --help lists the settings
       {NAME} model                   brings SmolLM2-135M-Instruct (98 MB, no account), for model=smollm2-135m
       {NAME} {"|".join(ANALYSES)} ...   what records say; --help after each tells more
       {NAME} --version"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: that of the command, or 2 for what cannot work."""
    words = sys.argv[1:] if words is None else list(words)
    first, rest = (words[0] if words else ""), words[1:]
    try:
        if first == "run":
            return _run(rest)
        if first == "model":
            return int(importlib.import_module(here("runners.engine.sources.fetched")).main(rest))
        if first == "--version":
            return _version()
        if first in ANALYSES:
            return int(importlib.import_module(here(ANALYSES[first])).main(rest))
    except ModuleNotFoundError as error:
        if str(error.name).startswith(NAME):
            raise
        print(f"error: {NAME} {first}: needs {error.name}; {_install(str(error.name), first)}", file=sys.stderr)
        return 2
    if first in ("-h", "--help"):
        print(USAGE)
        return 0
    print(f"error: {NAME} {first or 'without a command'}: unknown\n{USAGE}", file=sys.stderr)
    return 2


def _run(words: Sequence[str]) -> int:
    from runners import stopping

    stopping.listen()  # before the imports below, which take a second
    sys.argv = [f"{NAME} run", *words]
    from run import main as run_cells

    return run_cells()


def _version() -> int:
    from runners.records.provenance import commit

    print(f"{NAME} {metadata.version(NAME)}, commit {commit() or 'unknown'}")
    return 0


def _install(package: str, command: str) -> str:
    """What to type for a package that is not here: all of its extra, else of this distribution."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires(NAME) or []:
        need, _, when = line.partition(";")
        if match := re.fullmatch(r"extra == ['\"](\w+)['\"]", when.strip()):
            extras.setdefault(match[1], []).append(need.strip())
    holds = [extra for extra, needs in extras.items() if extra != "dev" and package in map(_module, needs)]
    extra = next(iter(holds), "analysis" if command in ANALYSES else None)
    return f"pip install {shlex.join(extras[extra])}" if extra else f"pip install {NAME} brings it"


def _module(requirement: str) -> str:
    """The name of a requirement as Python imports it, which is its own but for dashes."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("-", "_")
