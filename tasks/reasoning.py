"""Answers that are written out step by step: one that is wrong early on is wrong in the end.

Here: documents of our own. `chains` follow links from name to name until a value is held, `bridge` goes from one
      passage to another. As with word problems there are two readings: strict, every step, and flexible, the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tasks.base import Example, Task
from tasks.data.files import Files, check_limit, chosen, read_files
from tasks.data.rows import Tokens, wrong
from tasks.scoring import remarks
from tasks.table import Mean, mean_by_category

VERSION = "1"  # goes into every record; raise it when a score could change


@dataclass
class Reasoning(Task):
    """Follow links through a document and write them down.

    data: "bundled", or a path: .jsonl rows with `context`, `question` and `steps`, the whole answer.
    subset: names of files; None takes all.
    limit: samples per subset; None takes all.
    """

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit("reasoning", self.limit)
        self.data = str(self.data)

    @property
    def name(self) -> str:
        return "reasoning-mini" if self.data == "bundled" else "reasoning"

    def source(self) -> str:
        return f"{self.name} ({self._files.where}), {len(self._examples)} samples, sha256 {self._files.digest[:12]}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.name, "data_sha256": self._files.digest, "scores": VERSION}

    def examples(self) -> list[Example]:
        return self._examples

    def score(self, example: Example, prediction: str) -> float:
        return float(end_of(prediction) == end_of(example.answers[0]))

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        steps = prediction.split() == example.answers[0].split()
        return {"strict": float(steps), "flexible": self.score(example, prediction)}

    def measure(self, parts: Mapping[str, float]) -> str:
        return "flexible"

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """Both readings of every subset, then the mean over subsets of each."""
        subsets = [({**tags, "category": _mean_of(tags)}, mean) for tags, mean in self._subsets(examples)]
        return [mean for _, mean in subsets] + mean_by_category(subsets)

    def remarks(self, rows: remarks.Rows) -> list[str]:
        lines = [remarks.lengths(rows), remarks.held(rows)]
        if remarks.compared(rows):
            lines.append(remarks.flips(rows, _right, "flexible"))
        return [line for line in lines if line]

    @cached_property
    def _files(self) -> Files:
        return read_files("reasoning", self.data)

    @cached_property
    def _examples(self) -> list[Example]:
        found = []
        for name in chosen("reasoning", "subset", self.subset, list(self._files.found)):
            for i, row in enumerate(self._files.rows(name)[: self.limit]):
                found.append(self._example(f"{name}/{i}", name, row))
        return found

    def _example(self, id: str, name: str, row: Mapping[str, Any]) -> Example:
        tags = {"subset": name, "category": "mean"}
        missing = [key for key in ("context", "question", "steps") if not isinstance(row.get(key), str)]
        if missing:
            return Example(id, "", "", [], 1, tags, error=f"`{missing[0]}` is missing; it is a string")
        if error := wrong(row, {"max_new_tokens": Tokens | None}):
            return Example(id, "", "", [], 1, tags, error=error)
        limit = row.get("max_new_tokens") or 64
        return Example(id, row["context"], row["question"], [row["steps"]], limit, tags)


def end_of(text: str) -> str:
    """The last word of a text, without the full stop behind it."""
    words = text.split()
    return words[-1].rstrip(".") if words else ""


def _mean_of(tags: Mapping[str, Any]) -> str:
    """The row that a reading of a subset is averaged in."""
    return f"mean, {tags['subset'].rpartition(' ')[2]}"


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1
