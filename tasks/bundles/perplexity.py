"""perplexity-mini: prose, and documents whose last lines can only be predicted by looking things up in the first.

The prose is what CPython says of itself (its `pydoc` topics and docstrings, PSF licence), the part that the reference
model has not read. Every version of Python says something else, so that only the one it was collected with collects it
again; others keep the file as it is. The documents are generated.
"""

import json
from pathlib import Path

import numpy as np

from tasks.bundles import write_rows
from tasks.documents import KINDS, Pool, prose, prose_hash

SEED = 90417
COLLECTED = "a1892e560a1c46ce"  # hash of the prose, by CPython 3.11.7
KEPT = Path(__file__).resolve().parents[2] / "assets" / "perplexity-mini" / "prose.jsonl"
PROSE, DOCUMENTS = 12, 12  # texts
WORDS = 3000  # characters of a prose text; more than 1,024 tokens
CONTEXT = 2300  # characters of a document before its questions
ENOUGH = 3600  # characters of a whole document; more than 1,024 tokens


def prose_texts() -> list[str]:
    """Consecutive paragraphs, from evenly spread places on."""
    paragraphs = prose("held_out")
    texts = []
    for i in range(PROSE):
        at = i * len(paragraphs) // PROSE
        taken: list[str] = []
        while sum(map(len, taken)) < WORDS:
            taken.append(paragraphs[at % len(paragraphs)])
            at += 1
        texts.append("\n\n".join(taken))
    return texts


def document_text(i: int) -> str:
    """Facts of people, then questions about them with their answers, each fact asked for once."""
    document = KINDS["facts"](Pool(np.random.default_rng([SEED, i]), "held_out"), CONTEXT, 200, most=1, filler=0.1)
    text = document.opening
    for turn in document.turns:
        text += f"\n\n{turn.question}{turn.answer}"
        if len(text) > ENOUGH:
            break
    return text


def write(folder: Path) -> None:
    """prose.jsonl and lookups.jsonl."""
    write_rows(folder, "lookups", ({"text": document_text(i)} for i in range(DOCUMENTS)))
    if prose_hash("held_out") == COLLECTED:
        origin = f"CPython's documentation, PSF licence, sha256 {COLLECTED}"
        kept = [{"text": text, "origin": origin} for text in prose_texts()]
    else:
        kept = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    write_rows(folder, "prose", kept)
