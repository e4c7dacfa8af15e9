"""LongBench v2: four choices after a long document; the letter is read out of a generated sentence.

Paper: Bai et al. 2024, LongBench v2: towards deeper understanding and reasoning on realistic long-context multitasks,
       arXiv:2412.15204; its prompt without chain of thought.
Here:  the prompt is lm_eval's brought back to the benchmark's own; decoding is greedy, where the authors sample at
       temperature 0.1. lm_eval itself compares the likelihoods of the four letters, another metric:
       task=lm_eval task.tasks=[longbench2] task.data=hub. There is no longbench_v2-mini: the letter has to be written
       in a given sentence, which the small reference model never does, so that every method would score 0. Its
       stand-in are the bundled documents with four choices, whose texts are compared by likelihood.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from methods.core.errors import UserError
from methods.core.typed import shown
from tasks.base import Example, Task
from tasks.data.files import check_stand_in, chosen
from tasks.data.pins import PINNED
from tasks.lm_eval.task import LmEval
from tasks.prompts import lm_eval_folder, lm_eval_version
from tasks.rows import Hub, Rows, RowsTask
from tasks.scoring import remarks
from tasks.table import Mean, Metric

HUB = Hub("THUDM/LongBench-v2", None, "train")
ITEMS = 503
LETTERS = "ABCD"
FIELDS = ("domain", "sub_domain", "difficulty", "length", "question", *(f"choice_{x}" for x in LETTERS), "context")
LEVELS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
MOST_NEW = 128  # of the benchmark's own runs
CUE = "Answer:"
FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
MARK = re.compile(r"\{\{(question)\.strip\(\)\}\}|\{\{choices\[(\d)\]\}\}")
DIGEST = "fb68fca4"  # of lm_eval's template, whose wording was compared with the benchmark's


@dataclass
class LongBenchV2(RowsTask):
    """Choose one of four answers to a question on a long text.

    data: "hub", or a path: data.json as the benchmark offers it, or .jsonl rows.
    subset: domains, such as Single-Document QA; None takes all.
    limit: samples in all; None takes all.
    """

    title = "longbench_v2"
    wrong_row = "failed"
    metric = Metric("accuracy", digits=1)

    data: str = "hub"
    subset: Sequence[str] | str | None = None
    limit: int | None = None
    revision: str = PINNED

    @classmethod
    def chosen(cls, data: str = "bundled", limit: int | None = None, **knobs: Any) -> Task:
        """`bundled` is lm_eval-mini in its place."""
        if str(data) != "bundled":
            return cls(data, limit=limit, **knobs)
        check_stand_in("longbench_v2", cls, knobs, "lm_eval-mini")
        return LmEval(limit=limit)

    @property
    def name(self) -> str:
        return "longbench-v2"

    @property
    def contents(self) -> str:
        odd = "" if len(self._all) == ITEMS else f", not the published {ITEMS}"
        return f"{len(self._all)} items{odd}; {len(self._examples)} samples"

    @property
    def settings(self) -> dict[str, Any]:
        return {"lm_eval": lm_eval_version(), "template": DIGEST}

    def score(self, example: Example, prediction: str) -> float:
        return float(letter(prediction) == example.answers[0])

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """Plain means over samples: all of them, by difficulty, by length, by domain."""
        means = [_mean("overall", "average", [True] * len(examples))]
        for key, levels in LEVELS.items():
            means += [_mean(name, "category", [one.tags[key] == name for one in examples]) for name in levels]
        for name in dict.fromkeys(one.tags["domain"] for one in examples):
            means.append(_mean(name, "subset", [one.tags["domain"] == name for one in examples]))
        return [mean for mean in means if mean.n]

    def remarks(self, rows: remarks.Rows) -> list[str]:
        ours, full = (
            sum(letter(row["prediction"]) is None for row in side) / len(side) for side in remarks.sides(rows)
        )
        lines = [f"no letter found: {ours:.1%}, full {full:.1%}", remarks.lengths(rows), remarks.held(rows)]
        if remarks.compared(rows):
            lines.append(remarks.flips(rows, _right, "samples"))
        return [line for line in lines if line]

    def sets(self) -> Mapping[str, Hub]:
        return {"data": HUB}

    @cached_property
    def _all(self) -> list[dict[str, Any]]:
        return [row for name in self._files.files for row in self._files.rows(name)]

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """The rows of the chosen domains, with their own ids; a number, where it is not the only one of its name."""
        domains = list(dict.fromkeys(str(row.get("domain")) for row in self._all))
        wanted = chosen(self.title, "subset", self.subset, domains)
        named = [shown(row.get("_id")) for row in self._all]
        seen = Counter(named)
        ids = [name if seen[name] == 1 else str(i) for i, name in enumerate(named)]
        return {"v2": [(id, row) for id, row in zip(ids, self._all) if str(row.get("domain")) in wanted][: self.limit]}

    def tags(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        # one subset: every row of the table is a plain mean over samples, and is drawn as one
        tags = {"subset": self.name, "category": self.name, "chance": 1 / len(LETTERS)}
        return tags | {key: str(row.get(key)) for key in ("domain", *LEVELS)}

    def problem(self, name: str, row: Mapping[str, Any]) -> str | None:
        return problem(row)

    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        return Example(id, *prompt(row), [row["answer"]], MOST_NEW, tags, whole_question=False)


def problem(row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be a sample, or None."""
    for field in FIELDS:
        if not isinstance(row.get(field), str):
            return f"`{field}` is missing; it is a string"
    for key, levels in LEVELS.items():
        if row[key] not in levels:
            return f"`{key}` is {row[key]}; it is one of {', '.join(levels)}"
    return None if row.get("answer") in tuple(LETTERS) else f"`answer` is {row.get('answer')}; it is a letter, A to D"


def prompt(row: Mapping[str, Any]) -> tuple[str, str]:
    """The benchmark's own prompt in two parts, cut right after the context; all texts are stripped."""
    before, after = template()

    def fill(mark: re.Match[str]) -> str:
        return (row["question"] if mark[1] else row[f"choice_{LETTERS[int(mark[2])]}"]).strip()

    return before + row["context"].strip(), MARK.sub(fill, after)


def template() -> tuple[str, str]:
    """Before and after the context. Raises UserError if the installed lm_eval words it in another way."""
    path = lm_eval_folder("longbench2") / "_longbench_common_yaml"
    wanted = "install lm_eval 0.4.13, whose template is known"
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_text"]
    except OSError as error:
        raise UserError(f"longbench_v2: the installed lm_eval has no {path} ({error.strerror}); {wanted}") from error
    if hashlib.sha256(text.encode()).hexdigest()[:8] != DIGEST:
        raise UserError(f"longbench_v2: lm_eval {lm_eval_version()} words the prompt in another way; {wanted}")
    before, _, after = text.removesuffix(CUE).partition("{{context}}")
    return before, after + FORMAT


def letter(prediction: str) -> str | None:
    """The letter that an answer names, in brackets or else without; None if it names none."""
    text = prediction.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(pattern, text):
            return match[1]
    return None


def _mean(name: str, kind: str, counts: Sequence[bool]) -> Mean:
    return Mean(name, kind, np.array(counts, dtype=float) / max(1, sum(counts)))


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1
