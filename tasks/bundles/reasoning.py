"""reasoning-mini: chains of three to five links, and questions over two passages, whose answers are written out."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import write_rows
from tasks.documents import KINDS, Pool

SEED = 48221
COUNT = 14  # samples per file
CHARACTERS = (1300, 4200)  # of a context, from and to
# file: kind of document, settings, most new tokens
SPLITS: dict[str, tuple[str, dict[str, Any], int]] = {
    "chains_3": ("chains", {"links": 3, "restate": False}, 48),
    "chains_4": ("chains", {"links": 4, "restate": False}, 64),
    "chains_5": ("chains", {"links": 5, "restate": False}, 80),
    "bridge": ("bridge", {"restate": False}, 40),
}


def rows(name: str) -> list[dict[str, Any]]:
    """The samples of one file, from short to long."""
    kind, knobs, limit = SPLITS[name]
    (low, high), rows = CHARACTERS, []
    for i in range(COUNT):
        pool = Pool(np.random.default_rng([SEED, list(SPLITS).index(name), i]), "held_out")
        document = KINDS[kind](pool, low + (high - low) * i // (COUNT - 1), 1, **knobs)
        turn = document.turns[0]
        rows.append(
            {
                "context": document.opening,
                "question": f"\n\n{turn.question}",
                "steps": turn.answer,
                "max_new_tokens": limit,
            }
        )
    return rows


def write(folder: Path) -> None:
    """One JSONL file per kind of question."""
    for name in SPLITS:
        write_rows(folder, name, rows(name))
