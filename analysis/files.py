"""Files that are written whole or not at all, and tables that are safe to open elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# what a spreadsheet takes for the beginning of a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class CannotWrite(Exception):
    """A file cannot be written; the message says which, why and what would work."""


def given_path(text: str) -> Path:
    """A path as typed, for argparse. Raises ArgumentTypeError for an empty one, which would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; name a file or folder, or leave it out")
    return Path(text)


@contextlib.contextmanager
def whole(path: Path, advice: str = "give another place as --out") -> Iterator[Path]:
    """Where to write what becomes `path` once the block has ended; an earlier file stays until then.

    Raises CannotWrite on a disk that is full or read-only.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def check_out(out: Path | None, is_file: bool) -> None:
    """Raises CannotWrite unless `--out`, a folder or a file, can be written; its folder is made if it is missing."""
    if out is None:
        return
    if is_file and (not out.name or out.is_dir()):
        raise CannotWrite(f"--out={out}: is a folder; give the name of a file")
    folder = out.parent if is_file else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = "no folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise CannotWrite(f"--out={out}: cannot be written ({what}: {folder}); give another place") from error


def picture(out: Path | None) -> Path | None:
    """`--out` of a picture, a PNG where its name says no kind, checked by `check_out`. Raises CannotWrite."""
    from matplotlib.backend_bases import FigureCanvasBase

    check_out(out, is_file=True)
    kinds = sorted(FigureCanvasBase.filetypes)
    if out is None or not out.suffix:
        return out and out.with_suffix(".png")
    if out.suffix.removeprefix(".").lower() not in kinds:
        raise CannotWrite(f"--out={out}: is no kind of picture; end it in .{', .'.join(kinds)}")
    return out


def write(path: Path, text: str, **advice: str) -> None:
    """Write a text whole; advice: as in `whole`. Raises CannotWrite."""
    with whole(path, **advice) as draft:
        draft.write_text(text, encoding="utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table in which no text is taken for a formula: such a text begins with an apostrophe."""
    with whole(path) as draft:
        table.map(_no_formula).rename(columns=_no_formula).to_csv(draft, index=False)


def one_line(value: object) -> str:
    """A value as text without line breaks, for a row of a table."""
    return " ".join(str(value).splitlines())


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
