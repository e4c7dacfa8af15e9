"""Samples that differ in kind, length and depth: read from prompts that are written out, chosen, scored, summed up."""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from methods.core.errors import UserError
from methods.core.reading import read_bytes
from tasks.base import Example, Task
from tasks.data.rows import Depth, Text, Texts, wrong
from tasks.data.rows import Tokens as Most
from tasks.data.sources import expand, parse_rows
from tasks.scoring.matching import MATCHING
from tasks.table import Mean, mean_by_category, mean_of
from tasks.tokens import Tokens

FIELDS = {"kind": str, "length": int, "context": str, "question": str, "answers": list, "metric": str,
          "max_new_tokens": int}  # fmt: skip
TYPES = {"length": Most, "answers": Texts, "max_new_tokens": Most, "depth": Depth | None, "_id": Text | None,
         "group": str | None, "prefill": str | None}  # fmt: skip


class Grid(Task):
    """A task whose examples have the tags subset, category, length and, if it has one, depth.

    A sample with the tag `control` has a row of its own and counts in no average.
    data: "bundled", where prompts are written out, or what the task makes of it.
    """

    mean_over: ClassVar[Literal["categories", "subsets"]] = "subsets"
    data: str

    def _begin(self, who: str, bundled: Path, counts: Sequence[str]) -> None:
        """Check the settings of these names, whole numbers, and the bundled split. Raises UserError."""
        self.data = str(self.data)
        for key in counts:
            check_count(who, key, getattr(self, key))
        if self.data == "bundled" and not bundled.is_dir():
            raise UserError(
                f"{who}: the bundled split is missing at {bundled}; in a checkout, run python -m tasks.bundle {who}"
            )
        self._tokens: Tokens | None = None

    @property
    @abstractmethod
    def _written(self) -> tuple[dict[str, list[dict[str, Any]]], str] | None:
        """Prompts that are written out, and their hash; None where they are made."""

    def fit(self, tokens: Callable[[], Tokens]) -> None:
        if not self._written:
            self._tokens = tokens()

    def score(self, example: Example, prediction: str) -> float:
        return MATCHING[example.tags["metric"]](prediction, example.answers)

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """Subsets, categories of several, lengths, depths, the average; all but the first are means of subsets."""
        subsets = self._subsets(examples)
        table = [mean for _, mean in subsets]
        counted = [(tags, mean) for tags, mean in subsets if not tags.get("control")]
        members = Counter(tags["category"] for tags, _ in counted)
        table += mean_by_category([(tags, mean) for tags, mean in counted if members[tags["category"]] > 1])
        indices: dict[tuple[int, float, str], list[int]] = {}
        for i, example in enumerate(examples):
            if not example.tags.get("control"):
                for axis, (name, value) in enumerate(axes(example.tags)):
                    indices.setdefault((axis, value, name), []).append(i)
        for row in sorted(indices):
            subset_means = [mean for _, mean in self._subsets(examples, indices[row])]
            table.append(mean_of(row[2], "category", subset_means, "subsets"))
        if len(counted) > 1:
            table.append(mean_of("average", "average", [mean for _, mean in counted], "subsets"))
        return table


def axes(tags: dict[str, Any]) -> list[tuple[str, float]]:
    """The names of the rows of a sample's length and depth, and what they are sorted by."""
    rows = [(f"length {tags['length']}", float(tags["length"]))]
    if tags.get("depth") is not None:
        rows.append((f"depth {tags['depth']:g} %", float(tags["depth"])))
    return rows


def read_prompts(folder: Path, who: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows of every .jsonl file of a folder, or of one file, by kind; and the SHA-256 of what was read.

    Raises UserError that names file and line of a row that lacks something.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    digest = hashlib.sha256()
    for file in files:
        raw = read_bytes(file)
        digest.update(f"{file.name}\0{len(raw)}\0".encode() + raw)
        for number, row in enumerate(parse_rows(raw, str(file)), start=1):
            for key, sort in FIELDS.items():
                if not isinstance(row.get(key), sort) or not row[key]:
                    raise UserError(
                        f"{file}, row {number}: `{key}` is empty or missing; {who} needs {', '.join(FIELDS)}"
                    )
            if error := wrong(row, TYPES):
                raise UserError(f"{file}, row {number}: {error}")
            if row["metric"] not in MATCHING:
                raise UserError(f"{file}, row {number}: metric {row['metric']}; there are {', '.join(MATCHING)}")
            by_kind.setdefault(row["kind"], []).append(row)
    if not by_kind:
        raise UserError(f"{who}: task.data={folder} holds no rows")
    return by_kind, digest.hexdigest()


def holds_prompts(data: str) -> bool:
    """Whether a path is a .jsonl file or a folder with some."""
    path = expand(data)
    return path.suffix == ".jsonl" if path.is_file() else path.is_dir() and any(path.glob("*.jsonl"))


def examples_of(rows: dict[str, list[dict[str, Any]]], chosen: Iterable[str]) -> list[Example]:
    """Examples from rows that have their whole prompt."""
    examples = []
    for kind in chosen:
        for i, row in enumerate(rows[kind]):
            tags = {
                "subset": kind,
                "category": row.get("group") or kind,
                "metric": row["metric"],
                "length": row["length"],
                "depth": row.get("depth"),
            }
            examples.append(
                Example(
                    id=f"{kind}/{i}" if row.get("_id") in (None, "") else str(row["_id"]),
                    context=row["context"],
                    question=row["question"],
                    answers=[str(answer) for answer in row["answers"]],
                    max_new_tokens=row["max_new_tokens"],
                    tags=tags,
                    prefill=row.get("prefill") or "",
                )
            )
    for id, n in Counter(example.id for example in examples).items():
        if n > 1:
            raise UserError(f"task.data: {n} rows have the `_id` {id}; give each its own, or none")
    return examples


def choose(who: str, key: str, wanted: Any, offered: Iterable[Any]) -> list[Any]:
    """Those of `offered` that are asked for; None asks for all. Raises UserError for one that is not there."""
    offered = list(dict.fromkeys(offered))
    if wanted is None:
        return offered
    asked = as_list(wanted)
    if not asked:
        raise UserError(f"{who}: task.{key}=[] chooses nothing; there are {', '.join(map(str, offered))}")
    for item in asked:
        if item not in offered:
            raise UserError(f"{who}: task.{key}={item} is not there; there are {', '.join(map(str, offered))}")
    return [item for item in offered if item in asked]


def as_list(wanted: Any) -> list[Any]:
    """A list as typed, or one item alone."""
    return list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]


def check_count(who: str, key: str, value: Any) -> None:
    """Raises UserError unless `value` is None or a whole number of at least 1."""
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{who}: task.{key}={value}; give a whole number, 1 or more")


def limited(examples: Iterable[Example], limit: int | None) -> list[Example]:
    """The first `limit` samples of every subset, spread over its lengths and depths."""
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.tags["subset"], []).append(example)
    kept = []
    for group in members.values():
        n = len(group) if limit is None else min(limit, len(group))
        # one step aside each time: equal steps would meet the same depth again and again
        kept += [group[i * len(group) // n + i % (len(group) // n)] for i in range(n)]
    return kept


def digest_of(examples: Sequence[Example]) -> str:
    """SHA-256 of prompts and references."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.prompt, example.answers]).encode() + b"\n")
    return digest.hexdigest()
