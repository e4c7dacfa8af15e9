"""multiturn-mini: five questions each on a key-value list, and on a text with five pass codes among filler."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import write_rows
from tasks.documents import KINDS, Pool

SEED = 33187
TURNS = 5
# file: kind of document, settings, contexts, characters from and to
SPLITS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int]]] = {
    "list": ("table", {}, 12, (1100, 2400)),
    "codes": ("needle", {"needles": TURNS}, 12, (3000, 7000)),
}


def rows(name: str) -> list[dict[str, Any]]:
    """The contexts of one file, from short to long; the order of the questions is that of the draw."""
    kind, knobs, count, (low, high) = SPLITS[name]
    rows = []
    for i in range(count):
        pool = Pool(np.random.default_rng([SEED, list(SPLITS).index(name), i]), "held_out")
        document = KINDS[kind](pool, low + (high - low) * i // (count - 1), TURNS, **knobs)
        turns = [{"input": turn.question, "answer": turn.answer, "value": turn.value} for turn in document.turns]
        rows.append({"head": document.head, "context": document.context, "multi_turns": turns, "kind": "substring"})
    return rows


def write(folder: Path) -> None:
    """One JSONL file per kind of context."""
    for name in SPLITS:
        write_rows(folder, name, rows(name))
