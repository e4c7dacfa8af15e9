"""GSM8K: word problems whose solutions are written out and end in a number.

Papers: Cobbe et al. 2021, arXiv:2110.14168; Li et al. 2025, KVTuner, arXiv:2502.04420, whose tables are 4, 8 and 16
        shots of `gsm8k`, each as plain text and as turns.
Here:   prompts, examples and number patterns are read from the installed lm_eval. Its first sampler lives through the
        whole run, and so does ours: prompts depend on the order of the items, and are made all at once.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from methods.core.errors import UserError
from tasks.base import Apart, Example, Task, cut_at
from tasks.data.files import check_stand_in
from tasks.data.pins import PINNED
from tasks.data.rows import wrong
from tasks.prompts import lm_eval_task, lm_eval_version
from tasks.reasoning import Reasoning
from tasks.rows import FilesTask, Hub, failed
from tasks.scoring import remarks

HUB = {split: Hub("openai/gsm8k", "main", split) for split in ("test", "train")}
INVALID = "[invalid]"
SOLVED = {"question": str, "answer": str}
SAMPLER_SEED = 1234  # of lm_eval's own runs
MOST_NEW = 256  # what lm_eval's model of the Hugging Face library takes where a task names nothing
# name: where lm_eval keeps it
VARIANTS = {
    "gsm8k": ("gsm8k", "gsm8k"),
    "gsm8k_cot": ("gsm8k", "gsm8k-cot"),
    "gsm8k_cot_zeroshot": ("gsm8k", "gsm8k-cot-zeroshot"),
    "gsm8k_cot_llama": ("gsm8k", "gsm8k-cot-llama"),
    "gsm8k_llama": ("llama3/instruct/gsm8k", "gsm8k"),
}


@dataclass(frozen=True)
class Reading:
    """How a number is read out of an answer: the match of `pattern` at `index`, 0 the first, -1 the last."""

    name: str
    pattern: str
    index: int

    def read(self, answer: str) -> str:
        """The number as it stands, or "[invalid]"."""
        matches = re.findall(self.pattern, answer)
        if not matches:
            return INVALID
        match = matches[self.index]
        if isinstance(match, tuple):
            match = next((group for group in match if group), INVALID)
        return match.strip()


@dataclass
class GSM8K(FilesTask, Apart):
    """Solve word problems after some solved ones.

    data: "hub", or a path: test.jsonl, or a folder with it and, for the examples of `gsm8k`, train.jsonl.
    variant: lm_eval's name of the prompt.
    shots: solved examples; None: as many as lm_eval takes.
    multiturn: every example is a turn of the chat template, the question by the user, the solution by the assistant.
    max_new_tokens: of a solution; None: what lm_eval's task names, else 256.
    stop: strings at which a solution ends; None: those of lm_eval's task.
    flexible: score the flexible reading, as KVTuner does; False: the strict one. Both have their rows.
    limit: problems; None takes all.
    """

    title = "gsm8k"

    data: str = "hub"
    variant: str = "gsm8k"
    shots: int | None = None
    multiturn: bool = False
    max_new_tokens: int | None = None
    stop: Sequence[str] | None = None
    flexible: bool = True
    limit: int | None = None
    revision: str = PINNED

    @classmethod
    def chosen(cls, data: str = "bundled", limit: int | None = None, **knobs: Any) -> Task:
        """`bundled` is reasoning-mini, since no word problems are bundled."""
        if str(data) != "bundled":
            return cls(data, limit=limit, **knobs)
        check_stand_in("gsm8k", cls, knobs, "reasoning-mini")
        return Reasoning(limit=limit)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise UserError(f"gsm8k: task.variant={self.variant}; give one of {', '.join(VARIANTS)}")
        for key, least in (("shots", 0), ("max_new_tokens", 1)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"gsm8k: task.{key}={value}; give a whole number, {least} or more")
        if self.stop is not None and (
            isinstance(self.stop, str) or not all(isinstance(one, str) and one for one in self.stop)
        ):
            raise UserError(f"gsm8k: task.stop={self.stop}; give a list of strings, such as ['Question:']")
        if self._fixed is not None and self._shots > len(self._fixed):
            raise UserError(f"gsm8k: task.shots={self.shots}; {self.variant} has {len(self._fixed)} examples")

    @property
    def name(self) -> str:
        return f"{self.variant}-{self._shots}shot{'-turns' if self.multiturn else ''}"

    @property
    def contents(self) -> str:
        return f"{len(self._examples)} problems"

    @property
    def settings(self) -> dict[str, Any]:
        settings = {"lm_eval": lm_eval_version(), "max_new_tokens": self._most_new, "main": self._main}
        return settings | ({"stop": list(self.stop)} if self.stop is not None else {})

    def score(self, example: Example, prediction: str) -> float:
        return self.parts(example, prediction)[self._main]

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        answer = cut_at(prediction, self._stops)
        return {one.name: same(one.read(answer), example.answers[0]) for one in self._readings}

    def measure(self, parts: Mapping[str, float]) -> str:
        return self._main

    def remarks(self, rows: remarks.Rows) -> list[str]:
        lines = []
        for reading in self._readings:
            a, b = (
                sum(reading.read(cut_at(row["prediction"], self._stops)) == INVALID for row in side) / len(side)
                for side in remarks.sides(rows)
            )
            lines.append(f"no number found, {reading.name}: {a:.1%}, full {b:.1%}")
        if remarks.compared(rows):
            lines.append(remarks.flips(rows, _right, self._main))
        return [line for line in (*lines, remarks.lengths(rows), remarks.held(rows)) if line]

    @property
    def _main(self) -> str:
        return "flexible" if self.flexible else "strict"

    @cached_property
    def _task(self) -> dict[str, Any]:
        group, name = VARIANTS[self.variant]
        return lm_eval_task(name, group)

    @property
    def _fixed(self) -> list[dict[str, str]] | None:
        """The examples that the variant brings, or None where they are drawn."""
        return (self._task.get("fewshot_config") or {}).get("samples")

    @property
    def _shots(self) -> int:
        return int(self._task.get("num_fewshot") or 0) if self.shots is None else self.shots

    @property
    def _most_new(self) -> int:
        return self.max_new_tokens or int(self._task["generation_kwargs"].get("max_gen_toks") or MOST_NEW)

    @property
    def _stops(self) -> list[str]:
        if self.stop is not None:
            return list(self.stop)
        return list(self._task["generation_kwargs"].get("until") or [])

    @cached_property
    def _readings(self) -> list[Reading]:
        readings = []
        for one in self._task["filter_list"]:
            regex = one["filter"][0]
            name = "strict" if one["name"].startswith("strict") else "flexible"
            readings.append(Reading(name, regex["regex_pattern"], int(regex.get("group_select", 0))))
        return readings

    def sets(self) -> Mapping[str, Hub]:
        return HUB

    def make(self) -> list[Example]:
        names = list(self._files.files)
        test = "test" if "test" in names else names[0]
        rows, drawn = self._files.rows(test)[: self.limit], self._drawn(names)
        return [self._example(i, row, drawn) for i, row in enumerate(rows)]

    def _drawn(self, names: Sequence[str]) -> Any:
        """Gives the examples of the next problem."""
        if self._fixed is not None or not self._shots:
            fixed = list(self._fixed or [])[: self._shots]
            return lambda: fixed
        if "train" not in names:
            raise UserError(
                f"gsm8k: task.data={self.data} has no train.jsonl, from which {self.variant} draws its examples; "
                "put it beside test.jsonl, or give task.variant=gsm8k_cot or task.shots=0"
            )
        train = self._files.rows("train")
        for number, row in enumerate(train, 1):
            if error := wrong(row, SOLVED):
                raise UserError(f"{self._files.files['train'][0]}, row {number}: {error}")
        if len(train) < self._shots:
            raise UserError(
                f"gsm8k: task.shots={self._shots}: the train.jsonl of task.data={self.data} has {len(train)} rows to "
                f"draw them from; add rows, or give task.shots={len(train)}"
            )
        rng = random.Random(SAMPLER_SEED)
        return lambda: rng.sample(train, self._shots)

    def _example(self, i: int, row: Mapping[str, Any], drawn: Any) -> Example:
        shots = drawn()  # also for a row that cannot be run: later prompts depend on it
        tags = {"subset": self.variant, "category": self.variant}
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            return failed(f"{self.variant}/{i}", tags, "`question` or `answer` is missing")
        delimiter = self._task.get("target_delimiter", " ")
        solved = [(self._fill("doc_to_text", shot), self._fill("doc_to_target", shot)) for shot in shots]
        context = "" if self.multiturn else "".join(f"{asked}{delimiter}{target}\n\n" for asked, target in solved)
        return Example(
            id=f"{self.variant}/{i}",
            context=context,
            question=self._fill("doc_to_text", row),
            answers=[self._fill("doc_to_target", row)],
            max_new_tokens=self._most_new,
            tags=tags,
            shots=tuple(solved) if self.multiturn else (),
            chat=self.multiturn or self.variant.endswith("llama"),
            stop=tuple(self._stops),
        )

    def _fill(self, key: str, row: Mapping[str, Any]) -> str:
        return self._templates[key].render(**row)

    @cached_property
    def _templates(self) -> dict[str, Any]:
        from jinja2 import Environment

        environment = Environment(keep_trailing_newline=True)  # as lm_eval does
        return {key: environment.from_string(self._task[key]) for key in ("doc_to_text", "doc_to_target")}


def bare(text: str) -> str:
    """A number, or a solution that ends in one, as it is compared: without commas, dollars and a last full stop."""
    text = text.replace(",", "").replace("$", "")
    text = re.sub(r"(?s).*#### ", "", text)
    return re.sub(r"\.$", "", text).lower()


def same(number: str, reference: str) -> float:
    """1 if the number and that of the reference are the same string."""
    return float(bare(number) == bare(reference))


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1
