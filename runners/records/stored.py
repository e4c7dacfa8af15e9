"""The two files of a record as they are read: what cannot be is one line that names the file and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis import form
from methods.core.errors import UserError
from methods.core.reading import read_bytes
from runners.records.ledger import of_sample


def read_cell(folder: Path, fields: Mapping[str, form.Kind]) -> dict[str, Any]:
    """A record's cell.json with fields of `form`. Raises UserError."""
    path = folder / "cell.json"
    try:
        book = form.parse(read_bytes(path))
        form.check(book, fields)
    except ValueError as error:
        raise UserError(f"{path}: not a record that can be read ({error})") from error
    found: dict[str, Any] = book
    return found


def parse_sample(line: bytes, fields: Mapping[str, form.Kind] = form.SHOWN) -> dict[str, Any]:
    """A sample's line, with a ledger of its own; fields: of one that has not failed. Raises ValueError."""
    row = form.parse(line)
    form.check_sample(row, fields)
    try:
        return of_sample(row)
    except TypeError as error:
        raise ValueError(f"its ledger holds what is no number ({error})") from error


def read_samples(path: Path, fields: Mapping[str, form.Kind] = form.SHOWN) -> Iterator[dict[str, Any]]:
    """The samples of a samples.jsonl in order, without the half of a line that a killed run was writing.

    fields: as in `parse_sample`.  Raises UserError that names the line.
    """
    *whole, last = read_bytes(path).split(b"\n")
    for number, line in enumerate([*whole, last] if _is_json(last) else whole, 1):
        if not line:
            continue
        try:
            row = parse_sample(line, fields)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not a sample's record ({error}); mend it or delete that line"
            ) from error
        yield row


def _is_json(line: bytes) -> bool:
    try:
        form.parse(line)
    except ValueError:
        return False
    return True
