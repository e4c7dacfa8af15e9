"""summarization-mini: reports with numbered findings among filler; the summary lists the findings."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import write_rows
from tasks.documents import KINDS, Pool

SEED = 60913
COUNT = 36
CHARACTERS = (2200, 12000)  # of a report, from and to
POINTS = 3  # findings of a report


def rows() -> list[dict[str, Any]]:
    """The reports, from short to long."""
    (low, high), rows = CHARACTERS, []
    for i in range(COUNT):
        pool = Pool(np.random.default_rng([SEED, i]), "held_out")
        document = KINDS["findings"](pool, low + (high - low) * i // (COUNT - 1), 1, points=POINTS)
        rows.append(
            {
                "head": document.head,
                "report": document.context,
                "summary": document.turns[0].answer.strip(),
                "max_new_tokens": 72,
            }
        )
    return rows


def write(folder: Path) -> None:
    """findings.jsonl."""
    write_rows(folder, "findings", rows())
