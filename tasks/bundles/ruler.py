"""ruler-mini: RULER's tasks as far as the reference model can do them, in its own wording.

Nine of the thirteen: essays are generated prose, uuids and magic words are invented words, chains of names stand for
variable tracking, reports and passages for the two question sets. Counting words (cwe, fwe) and several keys in one
question (multiquery) are beyond the model. A row has its whole prompt, `context` + `question`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import prompt_of, write_rows
from tasks.bundles.needle import PROSE, codes, sentences
from tasks.documents import KINDS, Pool
from tasks.documents.document import Document
from tasks.documents.place import filler_of, noise_of, place_lines
from tasks.documents.pools import shuffled

SEED = 71009
LENGTHS = (512, 1024, 2048, 3400)  # tokens of a whole prompt and its answer, about
REPEATS = 3
TAIL = 40  # tokens of head and question, about
# characters per token of the reference tokenizer in other texts than prose, about
CODES, LIST, LINKS, FACTS, PASSAGES = 2.85, 1.7, 3.4, 3.5, 4.1
# task: its group, metric and longest answer
TASKS: dict[str, tuple[str, str, int]] = {
    "niah_single_1": ("single", "all", 16),
    "niah_single_2": ("single", "all", 16),
    "niah_multikey_1": ("multikey", "all", 16),
    "niah_multikey_2": ("multikey", "all", 16),
    "niah_multikey_3": ("multikey", "all", 16),
    "niah_multivalue": ("multivalue", "all", 72),
    "vt": ("vt", "all", 40),
    "qa_1": ("qa", "part", 16),
    "qa_2": ("qa", "part", 32),
}


def document_of(task: str, pool: Pool, tokens: int) -> tuple[Document, str, list[str]]:
    """Head and turns, the text, and what an answer has to hold."""
    if task in ("niah_single_1", "niah_single_2", "niah_multikey_1"):
        document = codes(pool, 4 if task == "niah_multikey_1" else 1)
        lines = sentences(document)
        room = int(PROSE * tokens) - sum(map(len, lines))
        filler = noise_of(pool, room) if task == "niah_single_1" else filler_of(pool, room)
        return document, place_lines(filler, lines, [pool.rng.random() for _ in lines]), [document.turns[0].value]
    if task == "niah_multikey_2":
        document = codes(pool, int(CODES * tokens) // 35)
        lines = sentences(document)
        return document, place_lines([], shuffled(pool.rng, lines), [0.0] * len(lines)), [document.turns[0].value]
    if task == "niah_multikey_3":
        document = KINDS["table"](pool, int(LIST * tokens), 1)
    elif task == "niah_multivalue":
        document = KINDS["findings"](pool, int(PROSE * tokens))
        return document, document.context, [f"{part.strip()}." for part in document.turns[0].value.split(".")[:-1]]
    elif task == "vt":
        document = KINDS["chains"](pool, int(LINKS * tokens), 1, links=4, restate=False)
        steps = document.turns[0].value.removesuffix(".").split()
        return document, document.context, steps[1::2]  # "follows", a name, "follows", a name, ..., "holds", a value
    elif task == "qa_1":
        document = KINDS["facts"](pool, int(FACTS * tokens), 1, filler=0.5, most=1)
    else:
        document = KINDS["bridge"](pool, int(PASSAGES * tokens), 1, restate=False)
        return document, document.context, [document.turns[0].value.removesuffix(".").split()[-1]]
    return document, document.context, [document.turns[0].value]


def rows(task: str) -> list[dict[str, Any]]:
    """The samples of one task: every length, repeated."""
    group, metric, new = TASKS[task]
    index, rows = list(TASKS).index(task), []
    for length in LENGTHS:
        for repeat in range(REPEATS):
            pool = Pool(np.random.default_rng([SEED, index, length, repeat]), "held_out")
            document, text, answers = document_of(task, pool, length - TAIL - new)
            rows.append(
                {
                    "_id": f"{task}/{length}/{repeat}",
                    "kind": task,
                    "group": group,
                    "length": length,
                    **prompt_of(document, text, answers, metric, new),
                }
            )
    return rows


def write(folder: Path, tasks: Sequence[str] = tuple(TASKS)) -> None:
    """One JSONL file per task."""
    for task in tasks:
        write_rows(folder, task, rows(task))
