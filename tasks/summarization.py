"""Summaries, in the set-ups that papers on caches have used; each has its own prompt, decoding and ROUGE package.

Papers: Adnan et al. 2024, Keyformer, arXiv:2403.09054 (keyformer: beam 4, rouge-score; 99 % of full is enough);
        Zhang et al. 2023, H2O, arXiv:2306.14048 (h2o: prepared XSum prompts, the package rouge).
Here:   `plain` is our own wording; `lm_eval` is lm_eval's CNN/DailyMail. An article that is too long is cut at its
        end and the frame around it stays, of which the original lost the last words. Samples are drawn without
        replacement. Everything is greedy unless beams or draws are asked for, also `h2o`, which sampled and had no
        beginning-of-sequence token.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from analysis import stats
from methods.core.errors import UserError
from tasks.base import Apart, Example, cut_at
from tasks.data.pins import PINNED
from tasks.data.rows import Text
from tasks.data.rows import Tokens as Most
from tasks.prompts import lm_eval_task
from tasks.rows import Hub, Rows, RowsTask
from tasks.scoring import remarks, rouge
from tasks.tokens import Tokens

ENOUGH, ENOUGH_TOKENS = 0.99, 0.9  # of the full cache's ROUGE and of its tokens: MLPerf's rule
RULE = {"ROUGE-1", "ROUGE-2", rouge.WHOLE}  # what has to reach it
SOURCES = ("article", "document", "dialogue", "report", "text")
SUMMARIES = ("highlights", "summary", "summary_gt")
HUB = {
    "cnn_dailymail": Hub("abisee/cnn_dailymail", "3.0.0", "validation"),
    "xsum": Hub("EdinburghNLP/xsum", None, "validation"),
    "samsum": Hub("knkarthick/samsum", None, "test"),
    "govreport": Hub("ccdv/govreport-summarization", None, "test"),
    "soda": Hub("allenai/soda", None, "test"),
}
INSTRUCTION = "Summarize the following news article:"
ONE_SENTENCE = "Provide a one-sentence summary of the following news article:"
# the Alpaca template with an input, which the fine-tuned models of the paper know
FRAME = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n",
    "\n\n### Response:",
)


@dataclass(frozen=True)
class Setup:
    """How a set-up decodes and scores.

    rouge: a package of tasks.scoring.rouge.  prompt_tokens: longest prompt, None: what the model reads.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    rouge: str = "rouge-score"
    prompt_tokens: int | None = None
    stops: tuple[str, ...] = ()
    chat: bool = False


SETUPS = {
    "plain": Setup(128, chat=True),
    "keyformer": Setup(128, min_new_tokens=30, prompt_tokens=1920),
    "h2o": Setup(64, rouge="rouge", stops=("###",)),
    "lm_eval": Setup(128, stops=("\n\n",)),
}


@dataclass
class Summarization(RowsTask, Apart):
    """Sum up articles, reports and dialogues.

    setup: "plain", "keyformer", "h2o" or "lm_eval".
    data: "bundled", "hub", or a path: .jsonl rows with a source and a summary, under the names of the public sets.
    subset: names of files, or with data=hub of the sets there; None takes all, of the hub cnn_dailymail.
    beams: width of the search; 1 is greedy.
    max_new_tokens: of a summary; None: the set-up's, or in `plain` what a row names itself.
    shuffle: a seed: take the samples of a seeded permutation instead of the first ones.
    limit: samples per subset; None takes all.
    """

    title = "summarization"
    version = "2"
    fields: ClassVar = {"max_new_tokens": Most | None, "head": Text | None}
    wrong_row = "failed"
    of_samples = frozenset({"data_sha256", "shuffle"})

    setup: str = "plain"
    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    beams: int = 1
    max_new_tokens: int | None = None
    shuffle: int | None = None
    limit: int | None = None
    revision: str = PINNED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.setup not in SETUPS:
            raise UserError(f"summarization: task.setup={self.setup}; give one of {', '.join(SETUPS)}")
        if type(self.beams) is not int or self.beams < 1:
            raise UserError(f"summarization: task.beams={self.beams}; give a whole number, 1 or more")
        if self.shuffle is not None and type(self.shuffle) is not int:
            raise UserError(f"summarization: task.shuffle={self.shuffle}; give a seed, a whole number")
        most = self.max_new_tokens
        if most is not None and (type(most) is not int or most < 1):
            raise UserError(f"summarization: task.max_new_tokens={most}; give a whole number of tokens, 1 or more")
        self._tokens: Callable[[], Tokens] | None = None

    @property
    def name(self) -> str:
        return super().name if self.setup == "plain" else f"{super().name}-{self.setup}"

    def fit(self, tokens: Callable[[], Tokens]) -> None:
        self._tokens = tokens

    @property
    def contents(self) -> str:
        n = sum(len(rows) for rows in self._rows.values())
        beams = f"beam {self.beams}, " if self.beams > 1 else ""
        return f"{', '.join(self._rows)}, {n} samples, {beams}{rouge.described(self._setup.rouge)}"

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "rouge": rouge.described(self._setup.rouge),
            "beams": self.beams,
            "max_new_tokens": self._most_new,
            "shuffle": self.shuffle,
        }
        if self._setup.rouge == "rouge-score":
            settings["sentences"] = rouge.splitter()[0]
        if self.setup == "keyformer":
            settings["frame"] = hashlib.sha256(repr((FRAME, INSTRUCTION, ONE_SENTENCE)).encode()).hexdigest()[:8]
        if self.setup == "lm_eval":
            settings["lm_eval"] = metadata.version("lm_eval")
        return settings

    def score(self, example: Example, prediction: str) -> float:
        return self.parts(example, prediction)[rouge.WHOLE]

    def measure(self, parts: Mapping[str, float]) -> str:
        return rouge.WHOLE

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        text = cut_at(prediction, self._setup.stops)
        if self.setup == "keyformer":
            text = text.replace("\n", " ").strip()
        return rouge.scores(self._setup.rouge, text, example.answers[0])

    def remarks(self, rows: remarks.Rows) -> list[str]:
        lines = []
        for name in self._rows:
            members = [row for row in rows if row[0].tags["subset"] == name]
            if not members:
                continue
            if remarks.compared(members) and all(
                set(row.get("parts", ())) >= RULE for _, *pair in members for row in pair
            ):
                lines.append(f"{name}: {criterion(members)}")
            lead = [
                rouge.scores(self._setup.rouge, example.tags["lead"], example.answers[0]) for example, _, _ in members
            ]
            means = ", ".join(f"{key} {100 * sum(one[key] for one in lead) / len(lead):.2f}" for key in lead[0])
            lines.append(f"{name}, first three sentences of the source instead: {means}")
        if self._setup.rouge == "rouge-score":
            cut = rouge.splitter()[0]
            lines.append(f"{rouge.WHOLE}: of whole texts; {rouge.BY_SENTENCE}: sentence by sentence, cut by {cut}")
        ours, full = (100 * distinct([row["prediction"] for row in side]) for side in remarks.sides(rows))
        lines.append(f"distinct pairs of words: {ours:.1f}%, full {full:.1f}%")
        return [line for line in (*lines, remarks.lengths(rows), remarks.held(rows)) if line]

    @property
    def _setup(self) -> Setup:
        return SETUPS[self.setup]

    @property
    def _most_new(self) -> int:
        return self.max_new_tokens or self._setup.max_new_tokens

    def sets(self) -> Mapping[str, Hub]:
        sets = HUB if self.subset else {"cnn_dailymail": HUB["cnn_dailymail"]}
        return {name: replace(one, split="test") if self.setup == "lm_eval" else one for name, one in sets.items()}

    def arranged(self, rows: Rows) -> Rows:
        rows = [(i, conversation(row) if isinstance(row.get("dialogue"), list) else row) for i, row in rows]
        return rows if self.shuffle is None else random.Random(self.shuffle).sample(rows, len(rows))

    def tags(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"subset": name, "category": name, "lead": lead(source_and_summary(row)[0] or "")}

    def problem(self, name: str, row: Mapping[str, Any]) -> str | None:
        source, summary = source_and_summary(row)
        if source is None:
            return f"no source ({', '.join(SOURCES)})"
        return f"no summary ({', '.join(SUMMARIES)})" if summary is None else super().problem(name, row)

    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        source, summary = source_and_summary(row)
        assert source is not None and summary is not None, "there is no problem"
        most = row.get("max_new_tokens") if self.setup == "plain" else None
        before, source, after = self._frame(tags["subset"], row, source)
        return Example(
            id,
            context=before + self._cut(source, before + after),
            question=after,
            answers=[summary],
            max_new_tokens=self.max_new_tokens or most or self._most_new,
            min_new_tokens=self._setup.min_new_tokens,
            tags=tags,
            chat=self._setup.chat,
            beams=self.beams,
            stop=self._setup.stops,
            lead=before,
        )

    def _frame(self, name: str, row: Mapping[str, Any], source: str) -> tuple[str, str, str]:
        """What stands before the source, the source, and what stands behind it."""
        if self.setup == "keyformer":
            instruction = ONE_SENTENCE if "xsum" in name else INSTRUCTION
            if "gov" in name:  # LongBench's own words for these reports
                instruction = lm_eval_task("gov_report")["doc_to_text"].split("\n")[0]
            return FRAME[0].format(instruction=instruction), source, FRAME[1]
        if self.setup == "lm_eval":
            before, _, after = lm_eval_task("cnn_dailymail", "cnn_dailymail")["doc_to_text"].partition("{{article}}")
            return before, source, after
        if self.setup == "h2o":  # the row holds the whole prompt
            at = source.rstrip().rfind("\n\n")
            return "", source[: max(at, 0)], source[max(at, 0) :]
        return f"{row.get('head') or 'Summarize the following text.'}\n\n", source, "\n\nSummary:"

    def _cut(self, source: str, frame: str) -> str:
        """The source, cut at its end where the set-up limits the prompt."""
        if self._setup.prompt_tokens is None or self._tokens is None:
            return source
        tokens = self._tokens()
        room = self._setup.prompt_tokens - tokens.count(frame) - tokens.opening
        ids = tokens.encode(source)
        return source if len(ids) <= room else tokens.decode(ids[:room])


def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of SODA, whose dialogue is a list of turns beside the list of their speakers, in the form of the others."""
    speakers, said = row.get("speakers"), row["dialogue"]
    turns = [str(one) for one in said]
    if isinstance(speakers, list) and len(speakers) == len(said):
        turns = [f"{who}: {one}" for who, one in zip(speakers, said)]
    return {"dialogue": "\n".join(turns), "summary": row.get("narrative") or row.get("summary")}


def source_and_summary(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """A row's source and its summary; None for one that is blank or missing."""

    def first(keys: Sequence[str]) -> str | None:
        return next((row[key] for key in keys if isinstance(row.get(key), str) and row[key].strip()), None)

    return first(SOURCES), first(SUMMARIES)


def lead(source: str) -> str:
    """The first three sentences."""
    return " ".join(re.split(r"(?<=[.!?])\s+", source.strip())[:3])


def distinct(texts: Sequence[str]) -> float:
    """The share of different pairs of neighbouring words, mean over texts; low where a text repeats itself."""
    shares = []
    for text in texts:
        words = text.split()
        pairs = list(pairwise(words))
        shares.append(len(set(pairs)) / len(pairs) if pairs else 1.0)
    return sum(shares) / len(shares) if shares else 0.0


def criterion(rows: remarks.Rows) -> str:
    """Whether every kind of ROUGE keeps 99 % of the full cache's, and the answers nine tenths of their tokens.

    "passes" needs the lower end of the 95 % interval of every ratio; a point estimate alone says so. rows: of one
    subset.
    """
    ours, full = remarks.sides(rows)
    said, points, bounds = [], [], []
    tags, ids = rows[0][0].tags, [example.id for example, _, _ in rows]
    key = stats.stratum(tags["category"], tags["subset"])
    for name in ours[0]["parts"]:
        if name not in RULE:
            continue
        scores = np.array([[a["parts"][name], b["parts"][name]] for a, b in zip(ours, full)])
        ratio, low, high = ratio_interval(stats.bootstrap(scores, np.ones(len(ids)), ids, key))
        points.append(ratio)
        bounds.append(low)
        said.append(f"{name} {ratio:.3f} ({low:.3f} to {high:.3f})")
    tokens = sum(row["tokens_out"] for row in ours) / max(1, sum(row["tokens_out"] for row in full))
    if min(points) < ENOUGH or tokens < ENOUGH_TOKENS:
        verdict = "fails"
    else:
        known = len(rows) > 1 and min(bounds) >= ENOUGH  # one sample has no interval
        verdict = "passes" if known else "passes as a point estimate"
    return f"99 % of the full cache: {verdict}; ratios {', '.join(said)}, tokens {tokens:.3f}"


def ratio_interval(means: np.ndarray) -> tuple[float, float, float]:
    """The ratio of two means and its 95 % interval, from [1 + resamples, 2]: the means themselves, then resampled.

    1 where both are 0.
    """
    ours, full = means.T
    ratios = np.where(full > 0, ours / np.where(full > 0, full, 1.0), np.where(ours > 0, np.inf, 1.0))
    low, high = np.percentile(ratios[1:], [2.5, 97.5], method="inverted_cdf")  # between infinities there is no mean
    return float(ratios[0]), float(low), float(high)
