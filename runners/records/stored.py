"""The two files of a record as runs read them: what cannot be is a UserError, in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis import records
from methods.core.errors import UserError


def read_cell(folder: Path, fields: Mapping[str, records.Kind]) -> dict[str, Any]:
    """A record's cell.json with fields of `analysis.records`. Raises UserError."""
    try:
        return records.read_cell(folder, fields)
    except records.Unreadable as error:
        raise UserError(str(error)) from error


def read_samples(path: Path, fields: Mapping[str, records.Kind] = records.SHOWN) -> Iterator[dict[str, Any]]:
    """The samples of a samples.jsonl, as `records.read_samples` gives them. Raises UserError."""
    try:
        yield from records.read_samples(path, fields)
    except records.Unreadable as error:
        raise UserError(str(error)) from error
