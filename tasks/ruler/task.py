"""RULER: thirteen synthetic tasks at a length in the model's own tokens, and the bundled split of the same shape.

Paper: Hsieh et al. 2024, RULER: what's the real context size of your long-context language models?, arXiv:2404.06654.
Here:  prompts are lm_eval's in the benchmark's own wording, generators follow the benchmark where lm_eval departs from
       it. Every sample has a random source of its own, so the draws are not the published ones. With sentences that are
       not punkt's, or texts that are no essays, the task is called ruler-custom.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from tasks import grid
from tasks.base import Example
from tasks.data.haystack import Haystack, read_haystack
from tasks.data.pins import PINNED
from tasks.data.sources import expand
from tasks.grid import Grid
from tasks.prompts import lm_eval_version
from tasks.ruler import counting, documents, niah, tracking
from tasks.ruler.fitting import Sample, most_units, shrink
from tasks.ruler.templates import DIGESTS, wording
from tasks.scoring import matching
from tasks.table import Row

BUNDLED = Path(__file__).parents[2] / "assets" / "ruler-mini"
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PASSED = 85.6  # of a length: what Llama-2-7B reaches at 4k
SENTENCES = ("auto", "punkt", "marks")
# task: its group
TASKS = {
    **{name: name.split("_")[1] for name in niah.NIAH},
    "vt": "vt",
    "cwe": "cwe",
    "fwe": "fwe",
    "qa_1": "qa",
    "qa_2": "qa",
}


SEED = 42


@dataclass
class Ruler(Grid):
    """Needles, variables, words and questions in long texts.

    data: "bundled"; "prose" or "hub" (essays) to make prompts with that text; or a path: .jsonl prompts, or a folder
        with essays and the files of the question sets.
    subset: names of tasks or of groups; None takes all that the data allow.
    lengths: tokens, or shares of the window up to 1; None takes all there are, or the published ones that fit.
    samples: per task and length, where prompts are made.  limit: samples per task.
    squad, hotpot: names of the two files in the folder.
    sentences: how essays are cut: "punkt", "marks" or "auto".
    """

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    lengths: Sequence[float] | float | None = None
    samples: int = 500
    limit: int | None = None
    squad: str = "dev-v2.0.json"
    hotpot: str = "hotpot_dev_distractor_v1.json"
    sentences: str = "auto"
    revision: str = PINNED
    data_seed: int = SEED

    of_samples = frozenset({"data_sha256", "chosen", "templates", "fill"})

    def __post_init__(self) -> None:
        self._begin("ruler", BUNDLED, ("samples", "limit"))
        if self.sentences not in SENTENCES:
            raise UserError(f"ruler: task.sentences={self.sentences}; give one of {', '.join(SENTENCES)}")

    @property
    def name(self) -> str:
        if self.data == "bundled":
            return "ruler-mini"
        own_text = self._written or self.data == "prose"
        return "ruler-custom" if own_text or (self._has_essays and self._splitter[0] != "punkt") else "ruler"

    def source(self) -> str:
        n = len(self._chosen)
        what = f"{n} task{'s'[: n > 1]}"
        if self._written:
            origin = "bundled" if self.data == "bundled" else self.data
            return f"{self.name} ({origin}), {what}, {len(self.examples())} samples, sha256 {self._written[1][:12]}"
        text = self.data
        if text not in ("prose", "hub") and not expand(text).exists():
            raise UserError(f"ruler: task.data={text}: nothing at {expand(text).absolute()}")
        if self._has_essays:
            text = f"{self._haystack.where}, sha256 {self._haystack.sha256[:12]}, cut by {self._splitter[0]}"
        missing = [task for task in TASKS if task not in self._chosen] if self.subset is None else []
        without = f", without {' and '.join(missing)} (no files)" if missing else ""
        return f"{self.name} (made with {text}), {what}{without}, {self.samples} samples per task and length"

    @property
    def fingerprint(self) -> dict[str, Any]:
        fingerprint: dict[str, Any] = {"task": self.name, "matching": matching.VERSION}
        if self._written:
            return fingerprint | {"data_sha256": self._written[1], "chosen": grid.digest_of(self.examples())}
        return fingerprint | {
            "data_sha256": grid.digest_of(self.examples()),
            "templates": DIGESTS,
            "lm_eval": lm_eval_version(),
            "sentences": self._splitter[0],
            "fill": {task: self.fill(task) for task in self._chosen},
            **({"seed": self.data_seed} if self.data_seed != SEED else {}),  # other samples of the same ids
        }

    def fill(self, task: str) -> tuple[float, float]:
        """Mean and least share of the length that a task's samples use, prompt and answer together."""
        shares = [e.tags["tokens"] / e.tags["length"] for e in self.examples() if e.tags["subset"] == task]
        return round(sum(shares) / len(shares), 4), round(min(shares), 4)

    def examples(self) -> list[Example]:
        return self._examples

    def summarize(self, rows: Sequence[tuple[Example, float]]) -> list[Row]:
        """The result table, in which a length that all tasks have says whether it is passed."""
        return [self._judged(row) for row in super().summarize(rows)]

    def _judged(self, row: Row) -> Row:
        is_place = row.kind == "category" and row.name.startswith(("length ", "depth "))
        if self._written or not is_place or row.score is None or len(self._chosen) < len(TASKS):
            return row
        verdict = "passed" if row.score >= PASSED else "not passed"
        return Row(row.name, row.kind, row.n, row.score, f"{row.note}; {verdict} ({PASSED})")

    @cached_property
    def _written(self) -> tuple[dict[str, list[dict[str, Any]]], str] | None:
        """Prompts that are written out, and their hash; None where they are made."""
        if self.data == "bundled":
            return grid.read_prompts(BUNDLED, "ruler")
        return grid.read_prompts(expand(self.data), "ruler") if grid.holds_prompts(self.data) else None

    @cached_property
    def _chosen(self) -> list[str]:
        """The tasks to run, in the benchmark's order. Raises UserError for one that is unknown or lacks its data."""
        groups = TASKS
        if self._written:
            groups = {task: rows[0].get("group", task) for task, rows in self._written[0].items()}
        wanted = None
        if self.subset is not None:
            wanted = []
            for typed in map(str, grid.as_list(self.subset)):
                tasks = [task for task, group in groups.items() if typed in (task, group)]
                wanted += tasks or grid.choose("ruler", "subset", [typed], [*groups, *groups.values()])
        chosen = grid.choose("ruler", "subset", wanted, groups)
        if self._written:
            return [task for task in TASKS if task in chosen] + [task for task in chosen if task not in TASKS]
        for task, file in (("qa_1", self.squad), ("qa_2", self.hotpot)):
            if task in chosen and not self._file(file).is_file():
                if wanted is not None:
                    raise UserError(f"ruler: {task} needs {self._file(file)}; put the published file there")
                chosen.remove(task)
        return chosen

    def _file(self, name: str) -> Path:
        return expand(self.data) / name

    @property
    def _has_essays(self) -> bool:
        """Whether a chosen task hides its needles in essays; the others need none."""
        return any(task in niah.NIAH and niah.NIAH[task].haystack == "essay" for task in self._chosen)

    @cached_property
    def _haystack(self) -> Haystack:
        return read_haystack(self.data, self.revision)

    @cached_property
    def _splitter(self) -> tuple[str, Callable[[str], list[str]]]:
        """The name and the function that cuts essays into sentences."""
        punkt = niah.punkt() if self.sentences != "marks" else None
        if punkt is None and self.sentences == "punkt":
            raise UserError("ruler: task.sentences=punkt needs nltk with its data punkt_tab; give task.sentences=marks")
        return ("punkt", punkt) if punkt else ("marks", niah.by_marks)

    @cached_property
    def _essay(self) -> niah.Essay:
        return niah.Essay(self._haystack, self._splitter[1])

    @cached_property
    def _examples(self) -> list[Example]:
        if self._written:
            examples = grid.examples_of(self._written[0], self._chosen)
            lengths = grid.choose("ruler", "lengths", self.lengths, sorted({e.tags["length"] for e in examples}))
            return grid.limited((e for e in examples if e.tags["length"] in lengths), self.limit)
        assert self._tokens is not None, "fit comes before examples"
        examples = [
            self._example(task, length, i, sample)
            for task in self._chosen
            for length in self._lengths
            for i, sample in enumerate(self._samples(task, length))
        ]
        return grid.limited(examples, self.limit)

    @cached_property
    def _lengths(self) -> list[int]:
        assert self._tokens is not None
        if self.lengths is not None:
            asked = grid.as_list(self.lengths)
            if not asked or not all(isinstance(n, int | float) and n > 0 for n in asked):
                raise UserError(f"ruler: task.lengths={self.lengths}; give tokens, or shares of the window up to 1")
            return list(dict.fromkeys(self._tokens.resolve("ruler", length) for length in asked))
        longest = self._tokens.longest
        lengths = [length for length in LENGTHS if longest is None or length <= longest]
        if not lengths:
            raise UserError(
                f"ruler: this model takes {longest} tokens uncut, the published lengths begin at {LENGTHS[0]}; "
                "give task.lengths=[...] in tokens, or as shares of the window up to 1"
            )
        return lengths

    def _example(self, task: str, length: int, i: int, sample: Sample) -> Example:
        family = "niah" if task in niah.NIAH else task.split("_")[0]
        tags = {
            "subset": task,
            "category": TASKS[task],
            "metric": "part" if family == "qa" else "all",
            "length": length,
            "tokens": sample.tokens,
        }
        return Example(
            id=f"{task}/{length}/{i}",
            context=sample.context,
            question=sample.question,
            answers=sample.outputs,
            max_new_tokens=wording(family).max_new_tokens,
            tags=tags,
            prefill=sample.prefix,
        )

    def _samples(self, task: str, length: int) -> list[Sample]:
        """All samples of a task at a length: as many units as fit, then each cut down where it is too long."""
        tokens = self._tokens
        assert tokens is not None
        family = "niah" if task in niah.NIAH else task.split("_")[0]
        beside = tokens.wrapper + wording(family).max_new_tokens
        draw_sample, step, start, reach = self._generator(task, family, length)

        def sized(i: Any, units: int) -> Sample:
            sample = draw_sample(random.Random(f"{self.data_seed}/{task}/{length}/{i}"), i, units)
            n = tokens.count(sample.prompt) + beside
            return Sample(sample.context, sample.question, sample.prefix, sample.outputs, n)

        probes = iter(range(10**6))

        def cost(units: int) -> int:
            return sized(f"probe {next(probes)}", units).tokens

        if family == "fwe":
            units = counting.most_coded_words(cost, length)
        else:
            units = most_units(cost, length, step, start, reach)
            if family == "cwe":
                units = min(units, len(counting.vocabulary()))
        who = f"ruler: a sample of {task}"
        return [shrink(lambda n, i=i: sized(i, n), units, length, step, who) for i in range(self._count(task))]  # type: ignore[misc]

    def _count(self, task: str) -> int:
        """Samples to make at a length; no more than could be chosen of them."""
        n = self.samples if self.limit is None else min(self.samples, self.limit)
        return min(n, len(self._collection(task).questions)) if TASKS[task] == "qa" else n

    def _generator(
        self, task: str, family: str, length: int
    ) -> tuple[Callable[[random.Random, Any, int], Sample], int, int, int]:
        """What draws sample i with so many units; the step, the first probe and the reach of the fitting."""
        lines = 25 if length >= counting.SHORT else 5
        if family == "niah":
            spec = niah.NIAH[task]
            essay = self._essay if spec.haystack == "essay" else None
            step = 500 if essay else lines
            return lambda rng, i, units: niah.make(rng, spec, units, essay), step, step, 3
        if family == "vt":
            assert self._tokens is not None
            example = tracking.Example(f"{self.data_seed}/vt/example", self._tokens.count)
            step = 10 if length >= counting.SHORT else 5
            return lambda rng, i, units: tracking.make(rng, units, example), step, step, 3
        if family == "cwe":
            return lambda rng, i, units: counting.make_cwe(rng, units, length), 10, counting.SHORT, 2
        if family == "fwe":
            step = (length - wording("fwe").max_new_tokens) // 32
            return lambda rng, i, units: counting.make_fwe(rng, units, length), step, step, 1
        pool = self._collection(task)

        def draw_sample(rng: random.Random, i: Any, units: int) -> Sample:
            question = pool.questions[i if isinstance(i, int) else 0]
            return documents.make(rng, question, pool.documents, units)

        return draw_sample, 10, 10, 3

    def _collection(self, task: str) -> documents.Collection:
        return self._squad if task == "qa_1" else self._hotpot

    @cached_property
    def _squad(self) -> documents.Collection:
        return documents.read_squad(self._file(self.squad))

    @cached_property
    def _hotpot(self) -> documents.Collection:
        return documents.read_hotpot(self._file(self.hotpot))
