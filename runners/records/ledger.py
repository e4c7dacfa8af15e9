"""A recorded sample's ledger: bytes of its own, whatever batch it was computed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: what is no number of bytes that rows share
WHOLE = ("n_layers", "share", "nominal_bits", "effective_bits")


def of_sample(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a ledger of its own: records used to hold the whole batch's, of which each row has an equal part.

    Only a ledger by row knows what padding held.
    """
    book, batch = row.get("ledger"), row.get("batch", 1)
    if not isinstance(book, dict) or "padding" in book or batch == 1:
        return row
    own = {
        name: value if name in WHOLE or value is None
        else [n / batch for n in value] if isinstance(value, list) else value / batch
        for name, value in book.items()
    }  # fmt: skip
    return {**row, "ledger": own}


def above(row: Mapping[str, Any]) -> bool:
    """Whether a sample held more at its prompt's end than its budget and what the method documents on top."""
    book = row["ledger"]
    return book["held_prompt"] > book.get("asked", book["held_prompt"]) + book.get("overhead", 0)


def misses(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How many samples are above their budget, in words; None where none is."""
    n = sum(map(above, rows))
    return f"{n} of {len(rows)} above the budget" if n else None
