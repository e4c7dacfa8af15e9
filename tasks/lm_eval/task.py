"""Any task of lm_eval, and any YAML file of its kind, on a compressed cache.

Here:  prompts, solved examples, metrics and filters are lm_eval's own objects, not copies; what is scored are the
       requests that they make. Its own model reads a request in one pass, in which no compression can be felt; here
       the prompt is compressed before the first token of a choice is predicted; with the full cache that is the same.
       A prompt is cut after its solved examples, or after the document in an item's field `context`: that is what
       protocol=query_agnostic compresses.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from methods.core.errors import UserError
from tasks.base import Example, Task, cut_at
from tasks.data import pins
from tasks.data.files import check_limit
from tasks.lm_eval.likelihoods import guessed, lengths, moved
from tasks.lm_eval.loading import OURS, Loader
from tasks.lm_eval.requests import compiled_once, example_of, requests_of, stops_of
from tasks.prompts import lm_eval_version
from tasks.scoring import remarks
from tasks.table import Mean, mean_by_category

VERSION = "1"  # goes into every record; raise it when a score could change
# items of the published splits, by lm_eval's names
ITEMS = {
    "piqa": 1838,
    "copa": 100,
    "openbookqa": 500,
    "winogrande": 1267,
    "sciq": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
}


@dataclass
class LmEval(Task):
    """Tasks of lm_eval: choices compared by likelihood, a continuation's likelihood, or generated answers.

    tasks: lm_eval's names; None: all that `include` or the bundled folder have.
    data: "bundled"; "real", the bundled split of real text; "hub": what lm_eval itself loads; or a folder with
        <task>.jsonl, with <task>/<split>.jsonl, or with the authors' own files of piqa, copa and openbookqa.
    shots: solved examples before every item; None: as many as the task says.
    include: a folder with task files of one's own, as lm_eval's include_path; "bundled" data are then what they name.
    trust_include: such files run code of their own (`!function`, Jinja); true says that they may.
    stride: tokens of a choice that are fed at once; None: all. 1 is exact for methods that drop while they decode.
    limit: items per task; None takes all.
    chat: whether the model's chat template is put around a prompt, solved examples and all, as one user turn; lm_eval's
        --apply_chat_template. Without it prompts are plain text, whatever the model has.
    revision: of the data on the hub, the same for all tasks; "pinned": what a task itself names, else the commit in
        hub-pins.yaml (tasks/data/pins.py).
    """

    tasks: Sequence[str] | str | None = None
    data: str = "bundled"
    shots: int | None = None
    include: str | None = None
    trust_include: bool = False
    stride: int | None = None
    limit: int | None = None
    chat: bool = False
    revision: str = pins.PINNED

    of_samples = frozenset({"tasks", "samples_sha256"})

    def __post_init__(self) -> None:
        check_limit("lm_eval", self.limit)
        if not isinstance(self.chat, bool):
            raise UserError(f"lm_eval: task.chat={self.chat}; give true or false")
        for key, least in (("shots", 0), ("stride", 1)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"lm_eval: task.{key}={value}; give a whole number, {least} or more")
        self.data = str(self.data)
        if self.tasks is None and self.data not in OURS and self.include is None:
            raise UserError(f"lm_eval: task.data={self.data}: which tasks? Give task.tasks, such as [piqa,copa]")
        if self._loader.foreign and not self.trust_include:
            raise UserError(
                f"lm_eval: task.include={self.include}: task files run code of their own (!function, Jinja); read "
                "them, and give task.trust_include=true if they may"
            )
        if self.revision != pins.PINNED and self.data != "hub":
            raise UserError(f"lm_eval: task.revision={self.revision} with task.data={self.data}; give task.data=hub")

    @property
    def name(self) -> str:
        shots = "" if self.shots is None else f"-{self.shots}shot"
        split = OURS[self.data].name if self._loader.bundled else "lm_eval"
        return f"{split}{shots}{'-chat' if self.chat else ''}"

    def source(self) -> str:
        """Which tasks, which of their splits and how many items, from where."""
        descriptions = []
        for name, task in self._loaded.items():
            n, split = len(task.eval_docs), task.config.test_split or task.config.validation_split
            odd = f", not the published {ITEMS[name]}" if ITEMS.get(name, n) != n else ""
            drawn = dict(task.config.generation_kwargs or {}).get("do_sample")
            asks = ", which asks to be drawn: sampling.temperature says how" if drawn else ""
            descriptions.append(f"{name} ({self._loader.repository(task)}{split}, {n} items{odd}{asks})")
        where = self.include if self.data == "bundled" and self.include is not None else self.data
        where += f", with the code of {self.include}" if self._loader.foreign else ""
        wrapped = "in the chat template" if self.chat else "without a chat template"
        return (
            f"{self.name} ({where}): {', '.join(descriptions)}; {len(self._examples)} samples {wrapped}, "
            f"lm_eval {lm_eval_version()}"
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "tasks": {name: str(task.VERSION) for name, task in self._loaded.items()},
            "shots": self.shots,
            **({"chat": True} if self.chat else {}),
            "stride": self.stride,
            "samples_sha256": self._digest,
            "lm_eval": lm_eval_version(),
            "scores": VERSION,
            **({"include": self._included} if self.include is not None else {}),
        }

    @property
    def _included(self) -> str:
        """A hash of the task files of one's own: they say how an answer is read."""
        folder = self._loader.folder
        files = sorted(folder.rglob("*")) if folder else []
        files = [path for path in files if path.suffix in (".yaml", ".yml", ".py")]
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def examples(self) -> list[Example]:
        return self._examples

    def rate(self, example: Example, likelihoods: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return self._plain(example, self._results(example, list(likelihoods)))

    def score(self, example: Example, prediction: str) -> float:
        return next(iter(self.parts(example, prediction).values()))

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        """Of a generated answer, which lm_eval's stops end and its filters read; one score per metric and filter."""
        task, (request, *_) = self._loaded[example.tags["subset"]], self._requests[example.id]
        one = copy.copy(request)
        one.resps, one.filtered_resps = [cut_at(prediction, stops_of(request))], {}
        scores = {}
        for filter in task._filters:
            filter.apply([one])
            (response,) = [one.filtered_resps[filter.name]]
            suffix = "" if filter.name == "none" else f", {filter.name}"
            for name, value in self._plain(example, task.process_results(one.doc, [response])).items():
                scores[f"{name}{suffix}"] = value
        return scores

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """One line per task and metric, then the mean of each metric over the tasks that have it."""
        subsets = [({**tags, "category": _mean_of(tags)}, mean) for tags, mean in self._subsets(examples)]
        means = mean_by_category(subsets) if len(self._loaded) > 1 else []
        return [mean for _, mean in subsets] + means

    def remarks(self, rows: remarks.Rows) -> list[str]:
        """What is more sensitive than accuracy, and which tasks the full cache itself does not know."""
        choosing = [row for row in rows if row[0].choices]
        lines: list[str | None] = [lengths(rows)]
        if choosing and remarks.compared(rows):
            lines += [remarks.flips(choosing, _right, "samples"), moved(choosing)]
        lines += [guessed(choosing)] if choosing else []
        return [line for line in lines if line]

    @property
    def _loader(self) -> Loader:
        return Loader(self.data, self.include, self.shots, self.revision)

    @cached_property
    def _names(self) -> list[str]:
        return self._loader.names(self.tasks)

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """lm_eval's own task objects."""
        return self._loader.load(self._names)

    @cached_property
    def _requests(self) -> dict[str, list[Any]]:
        """lm_eval's requests of every sample."""
        with compiled_once():
            return {
                id: requests
                for name, task in self._loaded.items()
                for id, requests in requests_of(name, task, self.data, self.limit, self.chat)
            }

    @cached_property
    def _examples(self) -> list[Example]:
        examples = []
        with compiled_once():
            for id, requests in self._requests.items():
                name = id.rpartition("/")[0]
                examples.append(example_of(id, name, self._loaded[name], requests, self.chat, self.stride))
        return examples

    def _results(self, example: Example, responses: list[Any]) -> dict[str, Any]:
        doc = self._requests[example.id][0].doc
        return self._loaded[example.tags["subset"]].process_results(doc, responses)

    def _plain(self, example: Example, results: Mapping[str, Any]) -> dict[str, float]:
        """The scores that are numbers of single samples; a metric of the whole set cannot be a mean of these."""
        plain = {str(key): float(value) for key, value in results.items() if _is_number(value)}
        if not plain:
            raise UserError(
                f"lm_eval: task.tasks={example.tags['subset']}: its metrics {', '.join(results)} belong to a whole set "
                "and not to single samples, which are what is recorded and compared here"
            )
        return plain

    @cached_property
    def _digest(self) -> str:
        """SHA-256 over all prompts, choices and references."""
        total = hashlib.sha256()
        for one in self._examples:
            parts = [one.id, one.context, one.question, one.answers, [(c.question, c.text) for c in one.choices]]
            total.update(json.dumps(parts).encode())
        return total.hexdigest()


def _is_number(value: Any) -> bool:
    return not isinstance(value, str | tuple | list | dict) and math.isfinite(float(value))


def _mean_of(tags: Mapping[str, Any]) -> str:
    """The row that a task's metric is averaged in."""
    part = tags["subset"].removeprefix(tags.get("stratum", "")).strip()
    return f"mean, {part}" if part else "mean"


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1
