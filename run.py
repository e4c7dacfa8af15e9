"""Compose the configuration, check it, and hand it to its runner.

    python run.py method=nacl budget=0.5 task=longbench
    python run.py -m method=full,nacl,snapkv budget=0.1,0.25,0.5 task=longbench

Exit codes: 0 done; 1 some samples failed or a budget was missed; 2 something the user gave cannot work; 130 Ctrl-C,
143 SIGTERM, 129 SIGHUP.
"""

import sys

from runners import stopping

if __name__ == "__main__":
    stopping.listen()  # before the imports below, which take a second

import errno
import os
from importlib import metadata
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.screen import any_text
from methods.core.errors import UserError
from methods.core.home import users
from runners.jobs import Failed, spread
from runners.records.provenance import commit
from runners.settings import auto, guard, yamls
from runners.settings.check import check_config
from runners.settings.explain import EXPECTED, report_error
from runners.settings.plugins import register
from runners.settings.trainers import for_trainer
from runners.settings.words import check_words, current, folders_of

CONF = Path(__file__).resolve().parent / "conf"
INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """One cell. Leaves with the exit code unless it is 0; in a sweep with Failed, so that the other cells still run."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check_config(cfg)
        if sweeping:
            words = [word for word in HydraConfig.get().overrides.task if not word.startswith("cells=")]
            several = [] if cfg.cells is None else [f"({len(cfg.cells)} cells)"]
            print(f"\n{' '.join([*words, *several])}", flush=True)
        code = execute(cfg)
    except EXPECTED as error:
        report_error(error)
        code = 2
    if code and sweeping and code != INTERRUPTED:
        raise Failed(code)
    if code:
        raise SystemExit(code)


def execute(cfg: DictConfig) -> int:
    """Run what a configuration that was checked describes; the exit code. Raises UserError for what cannot work."""
    from runners.settings.parts import runner_of  # imports torch

    with users.files_read():  # those that a method imports while it runs
        return runner_of(cfg).run(cfg)


def main() -> int:
    """Run the command line; returns the exit code."""
    any_text()
    if sys.platform == "win32":
        report_error(
            UserError("Windows: has no fcntl, which the records need; run it in WSL (wsl --install), as on Linux")
        )
        return 2
    if "--version" in sys.argv[1:]:
        print(f"kvfrontier {metadata.version('kvfrontier')}, commit {commit() or 'unknown'}")
        return 0
    # Hydra passes errors on instead of printing them in its own way; `report_error` asks for the user's own setting
    os.environ.setdefault("KVFRONTIER_TRACEBACK", os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser wants its flags before the overrides; this is the one that people type anywhere
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    guard.install()
    yamls.install()
    register()
    try:
        check_words(sys.argv[1:])
        users.announce(folders_of(sys.argv[1:]))
        with auto.decided(current(sys.argv[1:])) as words:
            sys.argv[1:] = spread(for_trainer(words))
            job()
    except Failed as failed:
        return failed.code
    except SystemExit as left:
        left_with = left.code if isinstance(left.code, int) else 0
        return stopping.code() if left_with == INTERRUPTED else left_with
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return stopping.code()
    except EXPECTED as error:
        report_error(error)
        return 2
    except OSError as error:
        if error.errno in FULL:
            report_error(UserError(f"cannot write on ({error.strerror}); make room and run the same command again"))
        # Hydra makes the sweep's folder before any of our code runs
        elif ".hydra-runs" in str(error.filename):
            results = str(error.filename).partition("/.hydra-runs")[0]
            report_error(UserError(f"results={results}: cannot be written ({error.strerror})"))
        elif error.filename is not None:  # a file that went away, or whose permissions did
            report_error(UserError(f"{error.filename}: cannot be used ({error.strerror})"))
        else:
            raise
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
