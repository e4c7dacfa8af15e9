"""An exception as a record keeps it: one line that ends with the place in the user's own file, and the traceback."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parents[2]
# what a method or a task is called by, and calls: the mistake is rarely there
SHARED = tuple(
    str(HOME / folder) for folder in ("runners", "kernels", "methods/core", "tasks/base.py", "hydra_plugins")
)
INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})
LONGEST = 8_000  # characters of a traceback: its end


class Problem(NamedTuple):
    """line: type, first line of the message, and where it happened.  traceback: as Python prints it."""

    line: str
    traceback: str


def problem(error: BaseException) -> Problem:
    """What is kept of an exception; from the second call on what the first one returned.

    The traceback itself holds the tensors of the failed pass: with this said, it can be let go.
    """
    described = error.__dict__.get("_kvfrontier_problem")
    if described is None:
        text = str(error).strip()
        line = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        if where := _place(error):
            line += f" ({where})"
        described = Problem(line, "".join(traceback.format_exception(error))[-LONGEST:])
        error.__dict__["_kvfrontier_problem"] = described
    return described


def _place(error: BaseException) -> str:
    """File, line and function of the innermost frame in a method's or a task's file; "" where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    frames_of_ours = [frame for frame in frames if not frame.filename.startswith((*INSTALLED, *SHARED, "<"))]
    if not frames_of_ours:
        return ""
    frame = frames_of_ours[-1]
    path = Path(frame.filename)
    shown = path.relative_to(HOME) if path.is_relative_to(HOME) else path
    return f"{shown}, line {frame.lineno}, in {frame.name}"
