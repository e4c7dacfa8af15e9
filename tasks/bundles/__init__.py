"""The bundled splits: <task>.py here writes assets/<task>-mini with `write(folder)`, from its own seed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.documents import Document


def write_rows(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """`name`.jsonl, the same bytes on every system."""
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), newline="\n", encoding="utf-8"
    )


def prompt_of(document: Document, text: str, answers: list[str], metric: str, max_new_tokens: int) -> dict[str, Any]:
    """The part of a row that is a whole prompt and how its answer is scored: a document's first question on `text`."""
    return {
        "context": f"{document.head}\n\n{text}",
        "question": f"\n\n{document.turns[0].question}",
        "answers": answers,
        "metric": metric,
        "max_new_tokens": max_new_tokens,
    }
