"""Errors that the user can mend, in one line each."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from methods.core.errors import UserError
from runners.settings.words import unread

# what `explain` has words for
EXPECTED = (UserError, HydraException, OmegaConfBaseException)

# Hydra's words for a name that no file of a group has
UNKNOWN_CHOICE = re.compile(r"Could not find '([\w/]+)/([^']*)'\s+Available options in '[^']*':\s*(.*?)(\n\S|$)", re.S)


def report_error(error: Exception) -> None:
    """Print one line about an error that the user can mend, and its traceback if HYDRA_FULL_ERROR=1 asks for it."""
    if os.environ.get("KVFRONTIER_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(f"error: {explain(error)}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """What was given, under the name it was typed, and what would work, in one line."""
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    text = str(cause)
    if isinstance(cause, OverrideParseException):
        return unread(cause.override)
    if match := UNKNOWN_CHOICE.search(text):
        group, name, options = match[1], match[2], match[3].split()
        if (group, name) == ("hydra/launcher", "submitit_slurm"):
            return f"hydra/launcher=slurm: needs hydra-submitit-launcher; {pip_install('slurm')}"
        close = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{group}={name}: unknown; {hint}{group} is one of {', '.join(options)}"
    if match := re.search(r"Could not override '([^']*)'", text):
        return f"{match[1]}: no such setting{_nearby(cause, match[1])}"
    if match := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{match[1]}: several values need -m in front of them, and a list is written [a,b]"
    return one_line(text)


def pip_install(extra: str) -> str:
    """What a user types for packages that are not always needed."""
    return f"pip install 'kvfrontier[{extra}]' brings it"


def one_line(text: str) -> str:
    """A text whose line ends are semicolons, and in which nothing moves a terminal's cursor."""
    line = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


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
