"""needle-mini: needles at fixed depths of texts of fixed lengths, in the reference model's own wording.

One file per kind: one needle, one needle among others of its sort, several that are all asked for, one in noise that
repeats, one pair of a key-value list. A row has its whole prompt, `context` + `question`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import prompt_of, write_rows
from tasks.documents import KINDS, Pool
from tasks.documents.document import Document
from tasks.documents.place import filler_of, noise_of, place_lines

SEED = 71003
LENGTHS = (512, 1024, 2048, 3400)  # tokens of a whole prompt, about
DEPTHS = (0, 25, 50, 75, 100)  # per cent
REPEATS = {"single": 2}
OTHERS = 7  # needles beside the one that is asked for
FINDINGS = 3
TAIL = 40  # tokens of head and question, about
PROSE, LIST = 4.65, 1.7  # characters per token of the reference tokenizer, about

Sample = tuple[Document, str, list[str]]  # head and turns; the text; what an answer has to hold


def codes(pool: Pool, n: int) -> Document:
    """n needles and nothing else, all of them asked for in turn; values are as short as those of other documents."""
    document = KINDS["needle"](pool, 0, n, needles=n)
    turns = []
    for turn in document.turns:
        value = pool.number(3, 4)
        turns.append(replace(turn, answer=turn.answer.replace(turn.value, value), value=value))
    return replace(document, context="", turns=tuple(turns))


def sentences(document: Document) -> list[str]:
    """The sentence behind each turn of `codes`, the one asked for first."""
    return [turn.question.rpartition("Answer: ")[2] + turn.answer for turn in document.turns]


def single(pool: Pool, tokens: int, depth: float) -> Sample:
    """One code in prose."""
    document = codes(pool, 1)
    return (
        document,
        place_lines(filler_of(pool, int(PROSE * tokens)), sentences(document), [depth]),
        [document.turns[0].value],
    )


def multi_key(pool: Pool, tokens: int, depth: float) -> Sample:
    """The code that is asked for among others."""
    document = codes(pool, OTHERS + 1)
    lines = sentences(document)
    depths = [depth, *((i + 0.5) / OTHERS for i in range(OTHERS))]
    text = place_lines(filler_of(pool, int(PROSE * tokens) - sum(map(len, lines))), lines, depths)
    return document, text, [document.turns[0].value]


def multi_value(pool: Pool, tokens: int, depth: float) -> Sample:
    """Several findings, all of them asked for."""
    document = KINDS["findings"](pool, 0, points=FINDINGS)
    lines = [f"{part.strip()}." for part in document.turns[0].value.split(".") if part.strip()]
    text = place_lines(filler_of(pool, int(PROSE * tokens) - sum(map(len, lines))), lines, spread(depth, FINDINGS))
    return document, text, lines


def passkey(pool: Pool, tokens: int, depth: float) -> Sample:
    """One code in the same sentences again and again."""
    document = codes(pool, 1)
    return (
        document,
        place_lines(noise_of(pool, int(PROSE * tokens)), sentences(document), [depth]),
        [document.turns[0].value],
    )


def kv(pool: Pool, tokens: int, depth: float) -> Sample:
    """A long list, one of whose values is asked for."""
    document = KINDS["table"](pool, int(LIST * tokens), 10_000)
    lines = document.context.split("\n")
    key = lines[round(depth * (len(lines) - 1))].partition(":")[0].removeprefix("- ")
    asked = next(turn for turn in document.turns if turn.question.endswith(f"Answer: {key}:"))
    chosen = Document(document.kind, document.head, document.context, (asked,))
    return chosen, document.context, [asked.value]


KINDS_OF_NEEDLES: dict[str, tuple[Callable[[Pool, int, float], Sample], str, int]] = {
    "single": (single, "all", 16),
    "multi_key": (multi_key, "all", 16),
    "multi_value": (multi_value, "all", 72),
    "passkey": (passkey, "first_number", 16),
    "kv": (kv, "word", 16),
}


def spread(depth: float, n: int) -> list[float]:
    """The first needle at its depth, the others in even steps behind it."""
    return [depth + i * (1 - depth) / n for i in range(n)]


def rows(kind: str) -> list[dict[str, Any]]:
    """The samples of one kind: every length, every depth, repeated."""
    make, metric, new = KINDS_OF_NEEDLES[kind]
    index, rows = list(KINDS_OF_NEEDLES).index(kind), []
    for length in LENGTHS:
        for depth in DEPTHS:
            for repeat in range(REPEATS.get(kind, 1)):
                pool = Pool(np.random.default_rng([SEED, index, length, depth, repeat]), "held_out")
                document, text, answers = make(pool, length - TAIL - new, depth / 100)
                rows.append(
                    {
                        "_id": f"{kind}/{length}/{depth}/{repeat}",
                        "kind": kind,
                        "length": length,
                        "depth": depth,
                        **prompt_of(document, text, answers, metric, new),
                    }
                )
    return rows


def write(folder: Path, kinds: Sequence[str] = tuple(KINDS_OF_NEEDLES)) -> None:
    """One JSONL file per kind."""
    for kind in kinds:
        write_rows(folder, kind, rows(kind))
