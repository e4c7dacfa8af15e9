"""Answers that are written out step by step: one that is wrong early on is wrong in the end.

Here: documents of our own. `chains` follow links from name to name until a value is held, `bridge` goes from one
      passage to another. As with word problems there are two readings: strict, every step, and flexible, the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tasks.base import Example
from tasks.data.rows import Tokens
from tasks.rows import RowsTask
from tasks.scoring import remarks
from tasks.table import Mean, mean_by_category


@dataclass
class Reasoning(RowsTask):
    """Follow links through a document and write them down.

    data: "bundled", or a path: .jsonl rows with `context`, `question` and `steps`, the whole answer.
    subset: names of files; None takes all.
    limit: samples per subset; None takes all.
    """

    title = "reasoning"
    fields: ClassVar = {"max_new_tokens": Tokens | None}
    wrong_row = "failed"

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    limit: int | None = None

    def problem(self, name: str, row: Mapping[str, Any]) -> str | None:
        missing = [key for key in ("context", "question", "steps") if not isinstance(row.get(key), str)]
        return f"`{missing[0]}` is missing; it is a string" if missing else super().problem(name, row)

    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        return Example(id, row["context"], row["question"], [row["steps"]], row.get("max_new_tokens") or 64, tags)

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


def end_of(text: str) -> str:
    """The last word of a text, without the full stop behind it."""
    words = text.split()
    return words[-1].rstrip(".") if words else ""


def _mean_of(tags: Mapping[str, Any]) -> str:
    """The row that a reading of a subset is averaged in."""
    return f"mean, {tags['subset'].rpartition(' ')[2]}"


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1
