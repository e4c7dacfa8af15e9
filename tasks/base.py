"""What a task is: examples made of strings, a score for each answer, and which samples each row of its table means."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from tasks.sampling import GREEDY, Sampling
from tasks.table import Mean, Metric, Row, average_rows, mean_by_category, mean_of
from tasks.tokens import Tokens


@dataclass(frozen=True)
class Turn:
    """A later question on the same context.

    question: what is asked, without the separator before it.
    answers: references; the first one stands in the golden history.
    tags: what the score must know of this question, where it is not as the example's tags say.
    """

    question: str
    answers: list[str]
    max_new_tokens: int
    tags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Forced:
    """A text that is fed as it stands and whose tokens are predicted one after the other; all counts are tokens.

    through: "prefix": the first `prompt` are the prompt, which is compressed; the rest is fed in steps of `stride`.
        "stream": the same, and every method goes on compressing while it is fed.
        "chunk": blocks of `stride`; each attends to the stored slots and itself, then all is compressed again.
        "one_pass": plain attention over the whole piece, in which no compression can be felt; for the full cache only.
    start, length: the piece, in tokens of the text.
    counted: the places in the piece whose prediction counts.
    bos: the piece begins with a beginning-of-sequence token of its own, if the tokenizer has one, and `start` does not
        count it; otherwise only the text does, and it is its token 0.
    prefix: of a text whose beginning only has one: it is there even if the tokenizer adds none, and is then the end of
        a sequence where no token begins one.
    """

    text: str
    through: Literal["prefix", "stream", "chunk", "one_pass"]
    start: int
    length: int
    prompt: int
    stride: int
    counted: Sequence[int]
    bos: bool = True
    prefix: bool = False


@dataclass(frozen=True)
class Timed:
    """Random tokens that are read and decoded to be timed, in turns with the full cache.

    length: tokens of a prompt.  batch: rows.  steps: passes of the decoding, one token per row each.
    rounds: how often all of it is repeated.  seed: of the tokens.
    """

    length: int
    batch: int
    steps: int
    rounds: int
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """One way for a prompt to go on, of which the likeliest is taken.

    question: the rest of its prompt, after the example's context; the same for all choices in most tasks.
    text: whose tokens' log-probabilities are summed, the blank before it included.
    """

    question: str
    text: str


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
    stop: strings that end an answer as soon as it holds one; they and what follows are no part of what is scored.
    chat: wrap the prompt in the chat template, if the tokenizer has one.
    whole_question: a prompt that is too long loses context only; False: its middle, whatever stands there.
    error: why this sample cannot be run; it is recorded as failed, and the others go on.
    turns: questions that follow the first one on the same compressed context.
    history: what a later question finds before it: "golden" the earlier questions with their reference answers, "own"
        with the generated ones, "none" nothing: every question is asked of the same stored context.
    recompress: compress again whenever a later question has been read.
    shots: earlier user and assistant turns, where the chat template is used.
    beams: width of the beam search; 1 is greedy.
    forced: a text to predict; context and question are empty then.
    choices: ways to go on from the context, scored by their likelihood; nothing is generated then.
    stride: tokens of a choice that are fed at once; None: all of them.
    timed: random tokens to be timed on; there are no strings then.
    weight: of the score in the mean over its subset.
    lead: what stands in `context` before the text that is asked about, such as instructions.
    begins: how the answer begins; it is fed token by token behind the prompt, as though it had been generated.
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
    whole_question: bool = True
    error: str | None = None
    prefill: str = ""
    turns: tuple[Turn, ...] = ()
    history: Literal["golden", "own", "none"] = "golden"
    recompress: bool = False
    shots: tuple[tuple[str, str], ...] = ()
    beams: int = 1
    forced: Forced | None = None
    choices: tuple[Choice, ...] = ()
    stride: int | None = None
    timed: Timed | None = None
    weight: float = 1
    stop: tuple[str, ...] = ()
    begins: str = ""
    lead: str = ""

    @cached_property
    def key(self) -> str:
        """What tells this sample from every other: a hash of all that a model is given and that a score is made from.

        It does not depend on which other samples were chosen.
        """
        told = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("error", "weight", "lead")
        }
        for name in ("stop", "begins"):  # as it was told before there were any
            if not told[name]:
                del told[name]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=_told).encode()).hexdigest()[:16]

    @property
    def without_text(self) -> "Example":
        """The same question, of which the text is left out."""
        return replace(self, context=self.lead)

    @property
    def kind(self) -> Literal["answer", "turns", "forced", "choices", "timed"]:
        """How it is run: one question, several, a text that is fed, choices to compare, tokens to time."""
        if self.timed is not None:
            return "timed"
        if self.forced is not None:
            return "forced"
        if self.choices:
            return "choices"
        return "turns" if self.turns or self.history == "none" else "answer"

    @property
    def prompt(self) -> str:
        """Context, question and prefill, as one string."""
        return self.context + self.question + self.prefill


def _told(value: Any) -> Any:
    """A part of an example as JSON takes it; a long text, which many examples share, by its hash."""
    if isinstance(value, Forced):
        return {**vars(value), "text": _hash(value.text)}
    if is_dataclass(value):
        return vars(value)
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    return list(value) if isinstance(value, Iterable) else type(value).__name__


@lru_cache(maxsize=64)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops that comes in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class Task(ABC):
    """A benchmark: knobs at construction, then strings only.

    metric: of `score` and of every row of the table.
    sampling: how answers are drawn where the user does not say.
    mean_over: what the average over the whole task is a mean of; either is a mean of subset means.
    of_samples: entries of the fingerprint that say which samples were chosen, or what is in them. A record has that in
        its samples' keys: the same sample is found again, whatever else is chosen beside it.
    """

    metric: ClassVar[Metric] = Metric()
    sampling: ClassVar[Sampling] = GREEDY
    mean_over: ClassVar[Literal["categories", "subsets"]] = "categories"
    of_samples: ClassVar[frozenset[str]] = frozenset({"data_sha256"})

    @classmethod
    def chosen(cls, **knobs: Any) -> "Task":
        """The task with these settings, or the one that takes its place where its own data are not to be had."""
        return cls(**knobs)

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
        """How good the prediction is, as `metric` says: in [0, 1] unless it says otherwise."""

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        """Scores of a prediction that have rows of their own, by name; none: `score` has the only row."""
        return {}

    def measure(self, parts: Mapping[str, float]) -> str:
        """The name of the part that is the sample's own score; "" where there are none."""
        return next(iter(parts), "")

    def rate(self, example: Example, likelihoods: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Scores of a sample whose choices were compared, by name; the first one is the sample's own.

        likelihoods: of each choice, in nats, and whether each of its tokens was the likeliest.
        """
        raise NotImplementedError(f"{self.name} has no choices")

    def remarks(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """Lines below the table, from samples (example, the method's record, the full cache's record)."""
        return []

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on besides the prediction: hashes and versions, ready for JSON."""

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """The lines of the result table, each as a weight per sample: subsets, then categories, then averages.

        examples: the samples that have a score, or the parts of theirs that `as_parts` makes.
        """
        subsets = self._subsets(examples)
        categories = mean_by_category(subsets)
        return [mean for _, mean in subsets] + categories + self._averages(subsets)

    def whole(self, examples: Sequence[Example]) -> Mean:
        """The one line that stands for the whole task, whatever its table shows: the mean that `mean_over` names.

        Controls count in it no more than in any average.
        """
        subsets = [(tags, mean) for tags, mean in self._subsets(examples) if not tags.get("control")]
        if not subsets:
            return Mean("all", "average", np.zeros(len(examples)))
        members = mean_by_category(subsets) if self.mean_over == "categories" else [mean for _, mean in subsets]
        return mean_of("all", "average", members, "category means" if self.mean_over == "categories" else "subsets")

    def summarize(self, rows: Sequence[tuple[Example, float]]) -> list[Row]:
        """The result table of scored samples."""
        scores = np.array([score for _, score in rows], dtype=float)
        return [mean.row(scores, self.metric.scale) for mean in self.means([example for example, _ in rows])]

    def _subsets(
        self, examples: Sequence[Example], among: Iterable[int] | None = None
    ) -> list[tuple[dict[str, Any], Mean]]:
        """One mean per subset, each with the tags of its first sample; among: places of the samples that count."""
        members: dict[str, list[int]] = {}
        for i in range(len(examples)) if among is None else among:
            members.setdefault(examples[i].tags["subset"], []).append(i)
        subsets = []
        for name, indices in members.items():
            weights = np.zeros(len(examples))
            weights[indices] = [examples[i].weight for i in indices]
            subsets.append((examples[indices[0]].tags, Mean(name, "subset", weights / weights.sum())))
        return subsets

    def _averages(self, subsets: list[tuple[dict[str, Any], Mean]]) -> list[Mean]:
        """The rows below the categories; a table of one category needs none."""
        return average_rows("average", subsets)


class Apart(Task):
    """A task whose subsets have no average: a mean of different metrics, or lengths, would mean nothing."""

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """One line per subset, or per part of its score."""
        return [mean for _, mean in self._subsets(examples)]


def as_parts(example: Example, record: Mapping[str, Any]) -> list[tuple[Example, float]]:
    """A recorded sample as the rows of the table count it: once, or once for each part of its score.

    A part is a subset of its own, named after the sample's subset and itself; `stratum` then names the subset that all
    parts of a sample were drawn from.
    """
    if not record.get("parts"):
        return [(example, record["score"])]
    tags, weights = example.tags, record.get("weights", {})
    parts = []
    for name, score in record["parts"].items():
        part_tags = {**tags, "subset": f"{tags['subset']} {name}".strip(), "stratum": tags["subset"]}
        parts.append((replace(example, tags=part_tags, weight=weights.get(name, example.weight)), score))
    return parts


def as_whole(example: Example, record: Mapping[str, Any]) -> list[tuple[Example, float]]:
    """A recorded sample as the mean over the whole task counts it: once, with the sample's own score and weight."""
    return [(replace(example, weight=record.get("weights", {}).get("", example.weight)), record["score"])]
