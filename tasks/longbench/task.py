"""LongBench and LongBench-E, and the bundled split of the same shape.

Paper: Bai et al. 2024, LongBench: a bilingual, multitask benchmark for long context understanding, arXiv:2308.14508.
Here:  the records are the original ones, the prompts those of lm_eval brought back to the original's wording, the
       scores those of the original code. The context is cut off right after its place in the template, so that a
       method can compress it before it sees the rest.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from methods.core.errors import UserError
from tasks.base import Example, Task
from tasks.data.pins import PINNED
from tasks.data.sources import DataFile, expand, from_hub, hub_commit, locate, parse_rows
from tasks.longbench.subsets import CODE, LONGBENCH, LONGBENCH_E, Subset, problem, read_catalog
from tasks.prompts import Template, lm_eval_version, longbench_template
from tasks.scoring import metrics
from tasks.table import Mean, average_rows, mean_of

ASSETS = Path(__file__).parents[2] / "assets"
BUNDLED = ASSETS / "longbench-mini"
REAL = ASSETS / "longbench-real"
ALL = "all"  # as `subset`, also where some subsets are the default
BINS = ("0-4k", "4-8k", "8k+")
LANGUAGES = {"en": "English", "zh": "Chinese"}


@dataclass
class LongBench(Task):
    """Long documents: question answering, summaries, few-shot learning, synthetic tasks and code.

    data: "bundled" (generated documents), "real" (bundled real text), "hub", or a path: a folder of <subset>.jsonl
        files, one such file, or LongBench's data.zip.
        A folder with a subsets.yaml of its own brings its own prompts, as the bundled ones do.
    subset: names of subsets or categories, or "all"; None takes those that a subsets.yaml calls the default ones, else
        all that the data have.
    limit: samples per subset, from the start of the file; None takes all.
    e: LongBench-E, whose scores come by length.
    revision: branch, tag or commit of the dataset on the hub; "pinned": the commit in hub-pins.yaml (data/pins.py).
    """

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    limit: int | None = None
    e: bool = False
    revision: str = PINNED

    of_samples = frozenset({"data_sha256", "templates", "jieba", "hub_commit"})

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise UserError(f"longbench: task.limit={self.limit}; give a whole number of samples per subset, 1 or more")
        if not isinstance(self.e, bool):
            raise UserError(f"longbench: task.e={self.e}; give true or false")
        self.data = str(self.data)
        ours = self._ours
        if ours and not (ours / "subsets.yaml").is_file():
            raise UserError(f"longbench: the bundled split is missing at {ours}; restore it, or use task.data=DIR")
        if self._own_prompts and self.e:
            raise UserError(f"longbench: task.e=true with task.data={self.data}; LongBench-E needs its own data files")
        self._wanted = self._resolve()

    @property
    def name(self) -> str:
        if self._ours:
            return "longbench-real" if self.data == "real" else "longbench-mini"
        if self._own_prompts:
            return "longbench-custom"
        return "longbench-e" if self.e else "longbench"

    def source(self) -> str:
        """Which data, from where, how much and its hash, one line."""
        origin = f"hub, revision {self._commit[:12]}" if self.data == "hub" else self.data
        origin = "bundled" if self._ours else origin
        n = len(self.examples())
        return (
            f"{self.name} ({origin}), {len(self._files)} subset{'s'[: len(self._files) > 1]}, "
            f"{n} sample{'s'[: n > 1]}, sha256 {self._digest[:12]}"
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        chosen = self._files
        fingerprint: dict[str, Any] = {
            "task": self.name,
            "data_sha256": self._digest,
            "metrics": metrics.VERSION,
            "templates": {name: self._template(name).digest for name in chosen},
        }
        if not self._own_prompts:
            fingerprint["lm_eval"] = lm_eval_version()
        if any(self._catalog[name].metric in metrics.NEEDS_JIEBA for name in chosen):
            fingerprint["jieba"] = metadata.version("jieba")
        if self.data == "hub":
            fingerprint["hub_commit"] = self._commit
        return fingerprint

    def examples(self) -> list[Example]:
        return self._examples

    def score(self, example: Example, prediction: str) -> float:
        tags = example.tags
        if tags["first_line"]:
            prediction = metrics.first_line(prediction)
        return metrics.best_score(tags["metric"], prediction, example.answers, tags.get("all_classes"))

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """Subsets, their length bins in LongBench-E, categories, averages.

        The averages of the benchmark's tables are means of category means, code counting as English and as Chinese.
        Papers on caches mostly take the plain mean over subsets, which is the line "by subset". Where there are both
        languages, "average" is the mean over all categories.
        """
        table = super().means(examples)
        return self._with_bins(table, examples) if self.e else table

    def _averages(self, subsets: list[tuple[dict[str, Any], Mean]]) -> list[Mean]:
        if self._own_prompts:
            return super()._averages(subsets)
        means = []
        present = [code for code in LANGUAGES if any(tags["language"] == code for tags, _ in subsets)]
        for code in present:
            language = LANGUAGES[code]
            members = [(tags, mean) for tags, mean in subsets if tags["language"] in (code, CODE)]
            by_category = average_rows(f"average {language}", members)
            means += by_category
            if by_category and len(members) > len({tags["category"] for tags, _ in members}):
                means.append(
                    mean_of(f"average {language} by subset", "average", [mean for _, mean in members], "subsets")
                )
        return means + (average_rows("average", subsets) if len(present) > 1 else [])

    def _with_bins(self, table: list[Mean], examples: Sequence[Example]) -> list[Mean]:
        """The table with each subset's bins below it, and an average per bin at the end."""
        means = []
        by_bin: dict[str, list[tuple[dict[str, Any], Mean]]] = {name: [] for name in BINS}
        for mean in table:
            means.append(mean)
            if mean.kind != "subset":
                continue
            tags = next(example.tags for example in examples if example.tags["subset"] == mean.name)
            for name in BINS:
                inside = [
                    example.tags["subset"] == mean.name and example.tags.get("bin") == name for example in examples
                ]
                means.append(Mean(f"{mean.name} {name}", "bin", np.array(inside) / max(1, sum(inside))))
                by_bin[name].append((tags, means[-1]))
        for name, members in by_bin.items():
            means += average_rows(f"average {name}", [(tags, mean) for tags, mean in members if mean.n])
        return means

    @property
    def _own_prompts(self) -> bool:
        """Whether the data bring their own subsets and prompts."""
        return self._folder is not None and (self._folder / "subsets.yaml").is_file()

    @cached_property
    def _folder(self) -> Path | None:
        return None if self.data == "hub" else self._ours or expand(self.data)

    @property
    def _ours(self) -> Path | None:
        """The folder of a bundled split; None for other data."""
        return {"bundled": BUNDLED, "real": REAL}.get(self.data)

    @cached_property
    def _own(self) -> dict[str, tuple[Subset, Template]]:
        assert self._folder is not None
        return read_catalog(self._folder / "subsets.yaml")

    @cached_property
    def _catalog(self) -> dict[str, Subset]:
        if self._own_prompts:
            return {name: subset for name, (subset, _) in self._own.items()}
        return LONGBENCH_E if self.e else LONGBENCH

    def _template(self, name: str) -> Template:
        return self._own[name][1] if self._own_prompts else longbench_template(name)

    def _resolve(self) -> dict[str, str] | None:
        """The names asked for, each with what the user typed for it; None for all. Raises UserError for an unknown."""
        if self.subset is None:
            first = [name for name, subset in self._catalog.items() if subset.default]
            return dict.fromkeys(first, "") if first else None
        if self.subset == ALL and ALL not in self._catalog:
            return None
        asked = (
            list(map(str, self.subset))
            if isinstance(self.subset, Iterable) and not isinstance(self.subset, str)
            else [str(self.subset)]
        )
        typed_names: dict[str, str] = {}
        for typed in asked:
            names = [name for name in self._catalog if typed in (name, name.removesuffix("_e"))] or [
                name for name, subset in self._catalog.items() if _plain(subset.category) == _plain(typed)
            ]
            if not names:
                raise UserError(f"longbench: task.subset={typed} is unknown here{self._hint(typed)}; {self._options()}")
            typed_names |= dict.fromkeys(names, typed)
        if not typed_names:
            raise UserError(f"longbench: task.subset=[] chooses nothing; {self._options()}")
        return {name: typed_names[name] for name in self._catalog if name in typed_names}

    def _hint(self, typed: str) -> str:
        if self._own_prompts and typed.removesuffix("_e") in LONGBENCH:
            return " (it is a subset of the full LongBench: task.data=DIR or task.data=hub)"
        if self.e and typed in LONGBENCH:
            return " (LongBench-E leaves it out)"
        return " (it belongs to LongBench-E: task.e=true)" if not self.e and typed in LONGBENCH_E else ""

    def _options(self) -> str:
        categories = dict.fromkeys(subset.category for subset in self._catalog.values())
        return f"subsets: {', '.join(self._catalog)}; categories: {', '.join(categories)}"

    @cached_property
    def _zip(self) -> Path:
        return from_hub(self.revision)

    @property
    def _commit(self) -> str:
        return hub_commit(self._zip) if self.data == "hub" else ""

    @cached_property
    def _files(self) -> dict[str, tuple[DataFile, bytes]]:
        """The chosen subsets' files and what is in them. Raises UserError if one is missing or needs jieba in vain."""
        path = self._folder or self._zip
        offered = locate(path)
        if not offered.keys() & self._catalog.keys() and path.is_file() and len(offered) == 1:
            offered = {self._named_inside(file): file for file in offered.values()}
        names = [name for name in self._wanted or self._catalog if name in offered or self._asked_by_name(name)]
        if not names:
            raise UserError(
                f"longbench: task.data={self.data} holds {', '.join(f'{name}.jsonl' for name in offered)}, "
                f"but no file of {self.name}: {', '.join(f'{name}.jsonl' for name in self._wanted or self._catalog)}"
            )
        for name in names:
            if name not in offered:
                raise UserError(
                    f"longbench: task.subset={name} needs {name}.jsonl in task.data={self.data}, "
                    f"which holds {', '.join(f'{other}.jsonl' for other in offered)}"
                )
        chinese = [name for name in names if self._catalog[name].metric in metrics.NEEDS_JIEBA]
        if chinese and find_spec("jieba") is None:
            raise UserError(
                f"longbench: {', '.join(chinese)} need jieba to be scored, which is not installed; "
                "pip install jieba, or leave them out of task.subset"
            )
        return {name: (offered[name], offered[name].read()) for name in names}

    def _asked_by_name(self, name: str) -> bool:
        return self._wanted is not None and self._wanted[name] in (name, name.removesuffix("_e"))

    def _named_inside(self, file: DataFile) -> str:
        """The subset of a file with another name: what its first row says."""
        rows = parse_rows(file.read(), file.where)
        name = str(rows[0].get("dataset", "")) if rows else ""
        return f"{name}_e" if self.e and not name.endswith("_e") else name

    @cached_property
    def _digest(self) -> str:
        """SHA-256 over the names and contents of the chosen files, and of the split's own settings."""
        digest = hashlib.sha256()
        if self._own_prompts and self._folder:
            digest.update((self._folder / "subsets.yaml").read_bytes())
        for name, (_, raw) in self._files.items():
            digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
        return digest.hexdigest()

    @cached_property
    def _examples(self) -> list[Example]:
        examples: list[Example] = []
        for name, (file, raw) in self._files.items():
            rows = parse_rows(raw, file.where)
            if not rows:
                raise UserError(f"{file.where}: holds no rows; a LongBench file has one JSON object per line")
            template, subset = self._template(name), self._catalog[name]
            examples += [
                self._example(f"{name}/{i}", name, subset, template, row) for i, row in enumerate(rows[: self.limit])
            ]
        return examples

    def _example(self, id: str, name: str, subset: Subset, template: Template, row: dict[str, Any]) -> Example:
        tags: dict[str, Any] = {
            "subset": name,
            "category": subset.category,
            "metric": subset.metric,
            "language": subset.language,
            "first_line": subset.first_line,
            "length": row.get("length"),
            "row_id": row.get("_id"),
        }
        if subset.metric in metrics.NEEDS_JIEBA:
            tags["jieba"] = metadata.version("jieba")
        if subset.metric == "class":
            tags["all_classes"] = row.get("all_classes")
        error = problem(row, subset, needs_length=self.e)
        if self.e and not error:
            tags["bin"] = length_bin(row["length"])
        context, question = ("", "") if error else template.fill(row["context"], row.get("input") or "")
        return Example(
            id=id,
            context=context,
            question=question,
            answers=[] if error else list(row["answers"]),
            max_new_tokens=subset.max_new_tokens,
            tags=tags,
            min_new_tokens=subset.min_new_tokens,
            stop_at_newline=subset.stop_at_newline,
            whole_question=False,
            chat=subset.chat,
            error=error,
            lead=template.before,
        )


def length_bin(length: int) -> str:
    """LongBench-E's bin of a record's `length`, which counts words."""
    return BINS[0] if length < 4000 else BINS[1] if length < 8000 else BINS[2]


def _plain(name: str) -> str:
    """A category as people type it: letters only, in lower case."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
