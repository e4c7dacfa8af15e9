"""Perplexity of a text, through a compressed cache: how well each token is predicted from what compression left.

Papers: Xiao et al. 2023, StreamingLLM, arXiv:2309.17453 (stream); Cai et al. 2024, LoCoCo, arXiv:2406.05317 (chunk);
        the one-pass definitions are those of the papers on quantization, of the Hugging Face guide and of lm_eval.
Here:   the score is the mean negative log-likelihood in nats, whose differences add up; its exponential is printed
        below the table. Caches are new for every piece of text.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from methods.core.errors import UserError
from tasks.base import Apart, Example, Forced
from tasks.data.files import Files, bundled_name, chosen, hub_rows
from tasks.data.pins import PINNED
from tasks.rows import FilesTask
from tasks.scoring import remarks
from tasks.table import Mean, Metric
from tasks.tokens import Tokens

VERSION = "1"  # goes into every record; raise it when a score could change
ROLLING_VERSION = "2"  # the same, of through=rolling
HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
CACHED, ONE_PASS = ("prefix", "stream", "chunk"), ("windows", "strided", "rolling")
COUNTS = ("memory", "all")
BUNDLED_LENGTH, MOST = 1024, 4096
CHUNKS = 8  # of a piece, as in LoCoCo's tables

Through = Literal["prefix", "stream", "chunk", "windows", "strided", "rolling"]


@dataclass(frozen=True)
class Piece:
    """A piece of a text and the places in it that count; see tasks.base.Forced."""

    start: int
    length: int
    counted: Sequence[int]
    weight: float


@dataclass
class Perplexity(FilesTask, Apart):
    """Predict texts token by token.

    data: "bundled", "real" (bundled real text), "hub" (WikiText-2), or a path: a text file, a .jsonl file with a `text`
        per line, or a folder.
    subset: names of files; None takes all.
    through: "prefix", "stream" or "chunk" feed the text through the cache; "windows", "strided" and "rolling" are the
        one-pass definitions, for the full cache only.
    length: tokens of a piece; None: 1024 for the bundled texts, or as many as the shortest has, else what the model
        reads, at most 4096.
    prompt: tokens before the first one that "prefix" counts; None: three quarters of the piece.
    stride: tokens per step of "prefix" and "stream" (None: 1), of a block of "chunk" (None: an eighth of the piece),
        of a step of "strided" (None: half a window).
    cap: slots that "stream" and "chunk" keep; the configuration hands the budget through.
    count: of "stream" and "chunk", "memory" counts the tokens that compression can reach, "all" also those before.
    hf_compat: weigh the windows of "strided" as the guide's newer code does, one token short.
    limit: pieces per subset; None takes all.
    """

    title = "perplexity"
    suffixes = (".jsonl", ".txt", ".md")
    metric = Metric("mean negative log-likelihood", "nats per token", "lower", scale=1, digits=4)

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    through: Through = "prefix"
    length: int | None = None
    prompt: int | None = None
    stride: int | None = None
    cap: float | int | None = None
    count: str = "memory"
    hf_compat: bool = False
    limit: int | None = None
    revision: str = PINNED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.through not in CACHED + ONE_PASS:
            raise UserError(f"perplexity: task.through={self.through}; give one of {', '.join(CACHED + ONE_PASS)}")
        if self.count not in COUNTS:
            raise UserError(f"perplexity: task.count={self.count}; give one of {', '.join(COUNTS)}")
        for key, least in (("length", 2), ("prompt", 2), ("stride", 2 if self.through == "chunk" else 1)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"perplexity: task.{key}={value}; give a whole number of tokens, {least} or more")
        if self.through in ("stream", "chunk") and (type(self.cap) is not int or self.cap < 2):
            raise UserError(
                f"perplexity: budget={self.cap} with task.through={self.through}; a cap is a number of slots, such as "
                "budget=256"
            )
        self._tokens: Callable[[], Tokens] | None = None

    def fit(self, tokens: Callable[[], Tokens]) -> None:
        self._tokens = tokens

    @property
    def contents(self) -> str:
        texts = sum(map(len, self._texts.values()))
        characters = sum(len(text) for of_file in self._texts.values() for text in of_file)
        return f"{texts} text{'s'[: texts > 1]}, {characters:,} characters, through={self.through}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "task": self.name,
            "data_sha256": self._files.digest,
            "through": self.through,
            "length": self._length,
            "stride": self._stride,
            "counting": ROLLING_VERSION if self.through == "rolling" else VERSION,
        }
        if self.through == "prefix":
            settings["prompt"] = self._prompt
        if self.through in ("stream", "chunk"):
            # both methods of a comparison count the same tokens
            settings |= {"cap": self.cap, "count": self.count, "counted_from": next(self._counted(), None)}
        if self.through == "strided":
            settings["hf_compat"] = self.hf_compat
        return settings

    def score(self, example: Example, prediction: str) -> float:
        raise NotImplementedError("perplexity has no predictions: the loss of the text itself is the score")

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """The mean over the tokens of each subset, and below it by their place in the piece."""
        order = list(self._texts)
        means = sorted(self._subsets(examples), key=lambda pair: order.index(pair[0]["file"]))
        return [replace(mean, kind=self._kind(tags)) for tags, mean in means]

    @staticmethod
    def _kind(tags: Mapping[str, Any]) -> str:
        """Of a sample's row: a text, or a bin of places in it."""
        return "subset" if tags["subset"] == tags["file"] else "bin"

    def remarks(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """Perplexities. Raises UserError if nothing that was dropped can have been felt."""
        self._check_felt(rows)
        lines = []
        for name in self._texts:
            pairs = [(ours, full) for example, ours, full in rows if example.tags["file"] == name]
            if not pairs:
                continue
            a, b = (math.exp(mean_loss([pair[i] for pair in pairs])) for i in (0, 1))
            counted = sum(ours["counted"] for ours, _ in pairs)
            lines.append(f"perplexity of {name}: {a:.3f}, full {b:.3f}, ratio {a / b:.4f}; {counted:,} tokens counted")
            lines += self._beyond(pairs)
        held = remarks.held(rows)
        return [*lines, held] if held else lines

    def _beyond(self, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """A line of the places beyond the model's window, where a full cache is no upper bound; empty without any."""
        window = self._reading.longest
        if window is None or self._length <= window:
            return []
        curves = [[bin for pair in rows for bin in pair[i]["curve"] if bin[0] >= window] for i in (0, 1)]
        if not curves[0]:
            return []
        a, b = (math.exp(sum(loss for _, _, loss in curve) / sum(n for _, n, _ in curve)) for curve in curves)
        counted = sum(n for _, n, _ in curves[0])
        first = min(position for position, _, _ in curves[0])
        return [
            f"  of these beyond the model's window, from place {first:,} on: {a:.3f}, full {b:.3f}; {counted:,} tokens"
        ]

    def _check_felt(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> None:
        if not remarks.compared(rows) or any(ours["curve"] != full["curve"] for _, ours, full in rows):
            return
        held = [ours["ledger"]["held_end"] / ours["ledger"]["full"] for _, ours, _ in rows]
        if self.through == "prefix" and min(held) > 0.99:
            return  # the budget allows everything
        if self.through in ONE_PASS:
            return
        if self.through != "prefix" and self._length <= int(self.cap or 0):
            return
        raise UserError(
            f"perplexity: with task.through={self.through} every loss equals the full cache's, so the score says "
            "nothing about the compression: the method acts after the attention that is scored, or not while a text is "
            "fed; methods that compress the prompt need task.through=prefix, those that keep a cap task.through=stream"
        )

    def read(self) -> Files:
        if self.data == "hub":
            rows, where = hub_rows("perplexity", *HUB, self.revision)
            # as the set is scored: rows keep their own line ends and are joined by two more
            text = "\n\n".join(row["text"] for row in rows)
            return Files.of_text(where, HUB[1], text)
        return super().read()

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        """Texts by the name of their file."""
        by_file: dict[str, list[str]] = {}
        for name in chosen("perplexity", "subset", self.subset, list(self._files.files)):
            texts = [row.get("text") for row in self._files.rows(name)]
            for number, text in enumerate(texts, 1):
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{self._files.files[name][0]}, row {number}: `text` is empty or missing")
            by_file[name] = [str(text) for text in texts]
        return by_file

    @cached_property
    def _reading(self) -> Tokens:
        assert self._tokens is not None, "a task is fitted before its examples are asked for"
        return self._tokens()

    @cached_property
    def _length(self) -> int:
        if self.length is not None:
            return self.length
        longest = self._reading.longest or MOST
        if self.through in ONE_PASS and self._reading.longest:
            longest += self._reading.special  # no special token is added to a piece, but the opening inside it
        if not bundled_name("perplexity", self.data):
            return min(longest, MOST)
        # a large vocabulary needs fewer tokens for the same text
        shortest = min(self._reading.count(text) for texts in self._texts.values() for text in texts)
        return min(longest, BUNDLED_LENGTH, shortest + self._reading.opening)

    @property
    def _prompt(self) -> int:
        return self.prompt if self.prompt is not None else self._length * 3 // 4

    @property
    def _stride(self) -> int:
        if self.stride is not None:
            return self.stride
        return {"chunk": max(2, self._length // CHUNKS), "strided": max(1, self._length // 2)}.get(self.through, 1)

    def make(self) -> list[Example]:
        if self.through == "prefix" and self._prompt >= self._length:
            raise UserError(
                f"perplexity: task.prompt={self._prompt} leaves nothing to predict of task.length={self._length}"
            )
        if self.through == "rolling" and not self._reading.prefix:
            raise UserError(
                "perplexity: task.through=rolling predicts a text from its first token on, and this tokenizer has no "
                "token that begins or ends a sequence to predict it from; give task.through=windows or strided"
            )
        if self.through == "strided" and self._stride > self._length:
            raise UserError(
                f"perplexity: task.stride={self._stride} skips tokens between pieces of task.length={self._length}; "
                "give a stride of at most the length"
            )
        if self.through in CACHED and next(self._counted(), None) is None:
            raise UserError(
                f"perplexity: task.length={self._length} ends before compression is felt with budget={self.cap} and "
                f"task.stride={self._stride}; give a longer piece, or less of the others"
            )
        examples: list[Example] = []
        for name, texts in self._texts.items():
            pieces: list[Example] = []
            for i, text in enumerate(texts):
                pieces += [
                    self._example(f"{name}/{i}/{k}", name, text, piece) for k, piece in enumerate(self._cut(text))
                ]
            if not pieces:
                longest = max(self._reading.count(text) for text in texts)
                raise UserError(f"perplexity: no text of {self._files.files[name][0]} has task.length={self._length} "
                                f"tokens, the longest has {longest}; give task.length={longest} or less")  # fmt: skip
            examples += pieces[: self.limit]
        return examples

    def _cut(self, text: str) -> list[Piece]:
        n = self._reading.count(text)
        if self.through in ONE_PASS:
            before = self._reading.prefix if self.through == "rolling" else self._reading.opening
            return one_pass(self.through, n + before, self._length, self._stride, self.hf_compat)
        step = self._length - self._reading.opening  # tokens of the text in a piece
        starts = range(0, n - step + 1, step)
        counted = list(self._counted()) if starts else []
        return [Piece(start, self._length, counted, len(counted)) for start in starts]

    def _counted(self) -> Iterator[int]:
        """Places that count in a piece; the first token of a block of `chunk` is never predicted."""
        cap, stride = int(self.cap or 0), self._stride
        if self.through == "prefix":
            first = self._prompt
        elif self.count == "all":
            first = 1
        elif self.through == "stream":
            # the queries of the step behind `cap` tokens still find all before them; what it drops the next one feels
            first = cap + stride + 1
        else:
            # the first block that ends with more than `cap` tokens is compressed
            first = (cap // stride + 1) * stride
        return (position for position in range(first, self._length) if self.through != "chunk" or position % stride)

    def _example(self, id: str, name: str, text: str, piece: Piece) -> Example:
        cached = self.through in CACHED
        forced = Forced(
            text,
            self.through if cached else "one_pass",  # type: ignore[arg-type]
            piece.start,
            piece.length,
            prompt=int(self.cap or 0) + 1 if self.through == "stream" else self._prompt,
            stride=self._stride if cached else piece.length,
            counted=piece.counted,
            bos=cached,
            prefix=self.through == "rolling",
        )
        tags = {"subset": name, "category": name, "file": name}
        return Example(id, "", "", [], 0, tags, forced=forced, weight=piece.weight)


def one_pass(through: str, n: int, length: int, stride: int, hf_compat: bool = False) -> list[Piece]:
    """The pieces of a text of n tokens, its beginning-of-sequence token included, and what counts in each.

    "windows": blocks, the rest is dropped.  "strided": windows of `length` every `stride` tokens, in which what the
    window before has not seen counts; hf_compat: weighed one short of that.  "rolling": as lm_eval: every token counts
    once, after one token of context at least, which for the text's first one is the beginning-of-sequence token.
    """
    if through == "windows":
        return [Piece(a, length, range(1, length), length - 1) for a in range(0, n - length + 1, length)]
    pieces, end = [], 1
    if through == "strided":
        for start in range(0, n, stride):
            stop = min(start + length, n)
            counted = range(max(end - start, 1), stop - start)
            pieces.append(Piece(start, stop - start, counted, len(counted) - (hf_compat and start > 0)))
            end = stop
            if stop == n:
                break
        return [piece for piece in pieces if len(piece.counted)]
    while end < n:
        new = min(length, n - end)
        start = max(0, end + new - length - 1)
        pieces.append(Piece(start, end + new - start, range(end - start, end + new - start), new))
        end += new
    return pieces


def mean_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean loss over all counted tokens of recorded samples, whatever the pieces they came in; nats."""
    return math.fsum(row["score"] * row["counted"] for row in rows) / sum(row["counted"] for row in rows)
