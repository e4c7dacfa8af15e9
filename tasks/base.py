"""What a task is: examples made of strings, a score for each answer, and the rows of the result table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tasks.tokens import Tokens


@dataclass(frozen=True)
class Example:
    """One sample. Its prompt is `context + question + prefill`, cut right after the long context.

    id: unique inside the task and stable between runs, such as "hotpotqa/17".
    context: the prompt up to and including the long context.
    question: the rest of the prompt.
    prefill: the start of the answer, given to the model; it stays outside a chat template's user turn.
    answers: references; the best of them counts.
    max_new_tokens, min_new_tokens: limits of the generation; tokens.
    tags: at least `subset` and `category`.
    stop_at_newline: the last token id of an encoded newline ends the generation too.
    chat: wrap the prompt in the chat template, if the tokenizer has one.
    error: why this sample cannot be run; it is recorded as failed, and the others go on.
    """

    id: str
    context: str
    question: str
    answers: list[str]
    max_new_tokens: int
    tags: dict[str, Any] = field(default_factory=dict)
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    chat: bool = True
    error: str | None = None
    prefill: str = ""

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.prefill


@dataclass(frozen=True)
class Row:
    """One line of the result table.

    kind: "subset", "bin", "category" or "average".
    n: samples behind the score.
    score: 0 to 100, rounded to two places; None when n is 0.
    note: how it was averaged, where that is not obvious.
    """

    name: str
    kind: str
    n: int
    score: float | None
    note: str = ""


def percent(scores: Iterable[float]) -> float | None:
    """100 times the mean of scores in [0, 1], rounded to two places; None when there are none."""
    scores = list(scores)
    return round(100 * sum(scores) / len(scores), 2) if scores else None


class Task(ABC):
    """A benchmark: knobs at construction, then strings only."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As printed and recorded; a bundled offline split says so in it."""

    def fit(self, tokens: Callable[[], Tokens]) -> None:
        """Called once before `examples`; a task whose prompts have a length in tokens asks `tokens` how to count."""
        return

    @abstractmethod
    def source(self) -> str:
        """Which data and from where, one line. Raises UserError if they are missing or broken."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """The chosen samples, in a fixed order. Raises UserError if the data are missing or broken."""

    @abstractmethod
    def score(self, example: Example, prediction: str) -> float:
        """How good the prediction is, in [0, 1]."""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on besides the prediction: hashes and versions, ready for JSON."""

    def groups(self, example: Example) -> list[str]:
        """Names of the result rows that this sample counts towards; a small table may leave some of them out."""
        return [example.tags["subset"], example.tags["category"], "average"]

    def summarize(self, rows: Sequence[tuple[Example, float]]) -> list[Row]:
        """The result table of scored samples: subsets, then categories, then averages, each in order of appearance."""
        subsets = self._subsets(rows)
        categories = mean_by_category(subsets)
        return [row for _, row in subsets] + categories + self._averages(subsets)

    def _subsets(self, rows: Sequence[tuple[Example, float]]) -> list[tuple[dict[str, Any], Row]]:
        """One row per subset, each with the tags of its first sample."""
        scores: dict[str, list[float]] = {}
        tags: dict[str, dict[str, Any]] = {}
        for example, score in rows:
            name = example.tags["subset"]
            tags.setdefault(name, example.tags)
            scores.setdefault(name, []).append(score)
        return [(tags[name], Row(name, "subset", len(s), percent(s))) for name, s in scores.items()]

    def _averages(self, subsets: list[tuple[dict[str, Any], Row]]) -> list[Row]:
        """The rows below the categories; a table of one category needs none."""
        return average_rows("average", subsets)


def mean_by_category(subsets: Iterable[tuple[dict[str, Any], Row]]) -> list[Row]:
    """One row per category: the plain mean of its subsets' printed scores, whatever their sizes."""
    members: dict[str, list[Row]] = {}
    for tags, row in subsets:
        members.setdefault(tags["category"], []).append(row)
    return [mean_row(name, "category", rows, "subsets") for name, rows in members.items()]


def average_rows(name: str, subsets: Sequence[tuple[dict[str, Any], Row]]) -> list[Row]:
    """The mean of the category means, as one row; none for fewer than two categories."""
    categories = mean_by_category(subsets)
    return [mean_row(name, "average", categories, "category means")] if len(categories) > 1 else []


def mean_row(name: str, kind: str, rows: list[Row], what: str) -> Row:
    scores = [row.score for row in rows if row.score is not None]
    note = f"mean of {len(scores)} {what}" if len(scores) > 1 else ""
    return Row(name, kind, sum(row.n for row in rows), round(fmean(scores), 2) if scores else None, note)
