"""Compose the configuration, check it, and hand it to its runner.

    python run.py method=nacl budget=0.5 task=longbench
    python run.py -m method=full,nacl,snapkv budget=0.1,0.25,0.5 task=longbench

Exit codes: 0 done; 1 some samples failed or a budget was missed; 2 something the user gave cannot work; 130 Ctrl-C.
"""

import difflib
import errno
import os
import re
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from methods.core.errors import UserError
from runners.check import check
from runners.jobs import Failed, spread

CONF = Path(__file__).resolve().parent / "conf"
INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Hydra's words for a name that no file of a group has
UNKNOWN_CHOICE = re.compile(r"Could not find '([\w/]+)/([^']*)'\s+Available options in '[^']*':\s*(.*?)(\n\S|$)", re.S)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """One cell. Leaves with the exit code unless it is 0; in a sweep with Failed, so that the other cells still run."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping:
        words = [word for word in HydraConfig.get().overrides.task if not word.startswith("cells=")]
        several = [] if cfg.cells is None else [f"({len(cfg.cells)} cells)"]
        print(f"\n{' '.join([*words, *several])}", flush=True)
    try:
        check(cfg)
        code = hydra.utils.instantiate(cfg.runner).run(cfg)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        report(error)
        code = 2
    if code and sweeping and code != INTERRUPTED:
        raise Failed(code)
    if code:
        raise SystemExit(code)


def main() -> int:
    """Run the command line; returns the exit code."""
    # Hydra passes errors on instead of printing them in its own way; `report` asks for the user's own setting
    os.environ.setdefault("KVFRONTIER_TRACEBACK", os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser wants its flags before the overrides; this is the one that people type anywhere
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    try:
        sys.argv[1:] = spread(sys.argv[1:])
        job()
    except Failed as failed:
        return failed.code
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except (UserError, HydraException, OmegaConfBaseException) as error:
        report(error)
        return 2
    except OSError as error:
        if error.errno in FULL:
            report(UserError(f"cannot write on ({error.strerror}); make room and run the same command again"))
        # Hydra makes the sweep's folder before any of our code runs
        elif ".hydra-runs" in str(error.filename):
            results = str(error.filename).partition("/.hydra-runs")[0]
            report(UserError(f"results={results}: cannot be written ({error.strerror})"))
        else:
            raise
        return 2
    return 0


def report(error: Exception) -> None:
    """Print one line about an error that the user can mend, and its traceback if HYDRA_FULL_ERROR=1 asks for it."""
    if os.environ.get("KVFRONTIER_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(f"error: {explain(error)}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """What was given, under the name it was typed, and what would work, in one line."""
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    text = str(cause)
    if found := UNKNOWN_CHOICE.search(text):
        group, name, options = found[1], found[2], found[3].split()
        close = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{group}={name}: unknown; {hint}{group} is one of {', '.join(options)}"
    if found := re.search(r"Could not override '([^']*)'", text):
        return f"{found[1]}: no such setting{_nearby(cause, found[1])}"
    if found := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{found[1]}: several values need -m in front of them, and a list is written [a,b]"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _nearby(error: BaseException, key: str) -> str:
    """Settings with a similar name beside the one that does not exist, as the end of a sentence."""
    parent = getattr(error.__cause__, "parent_node", None)
    if not isinstance(parent, DictConfig):
        return ""
    names = [str(name) for name in parent if name not in ("hydra", "_target_")]
    *above, last = key.split(".")
    close = difflib.get_close_matches(last, names, 1)
    if close:
        return f"; did you mean {'.'.join([*above, close[0]])}?"
    return f"; {'.'.join(above)} has {', '.join(names)}" if above else f"; there are {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
