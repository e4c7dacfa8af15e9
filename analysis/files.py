"""Files that are written whole or not at all, and tables that are safe to open elsewhere."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

# what a spreadsheet takes for the beginning of a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class CannotWrite(Exception):
    """A file cannot be written; the message says which, why and what would work."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` once the block has ended; an earlier file stays until then.

    Raises CannotWrite on a disk that is full or read-only.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        raise CannotWrite(
            f"{path}: cannot be written ({error.strerror or error}); give another place as --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text whole. Raises CannotWrite."""
    with whole(path) as draft:
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
