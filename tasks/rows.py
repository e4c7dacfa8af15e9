"""Tasks whose samples are made of files: where these come from, the prompt of a row, the score of an answer."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from methods.core.errors import UserError
from tasks.base import Example, Task
from tasks.data.files import Files, bundled_name, check_limit, chosen, hub_rows, read_files
from tasks.data.pins import PINNED
from tasks.data.rows import empty, wrong

Rows = list[tuple[Any, dict[str, Any]]]
COMMON = ("data", "subset", "limit", "revision")  # settings that say which samples, and not what is done with them


@dataclass(frozen=True)
class Hub:
    """Where rows lie on the hub: a dataset, one of its configurations (None: its only one), one of its splits."""

    repo: str
    config: str | None
    split: str


class FilesTask(Task):
    """A dataclass of the settings that its YAML names; `data` may be one of them, and `subset`, `limit`, `revision`.

    title: what it is called: in messages, and of the bundled split, whose files are in assets/<title>-mini.
    version: goes into every record; raise it when a score could change.
    suffixes: of the files that are read.

    data: "bundled", "real" if there is such a split (tasks/data/files.py), "hub" if `sets` says where, or a path to a
        file or a folder of them.
    subset: names of files; None takes all.
    limit: samples per file; None takes all.
    revision: of the datasets on the hub: a branch, tag or commit, or "pinned" (tasks/data/pins.py).
    """

    title: ClassVar[str]
    version: ClassVar[str] = "1"
    suffixes: ClassVar[Sequence[str]] = (".jsonl", ".json")

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    limit: int | None = None
    revision: str = PINNED

    def __post_init__(self) -> None:
        """Raises UserError for a setting that cannot be; a task with more to check calls this first."""
        check_limit(self.title, self.limit)
        self.data = str(self.data)

    def sets(self) -> Mapping[str, Hub]:
        """What data="hub" reads, by the names that `subset` calls them; empty: nothing is there."""
        return {}

    @property
    def name(self) -> str:
        return bundled_name(self.title, self.data) or self.title

    def source(self) -> str:
        return f"{self.name} ({self._files.where}), {self.contents}, sha256 {self._files.digest[:12]}"

    @property
    def contents(self) -> str:
        """What was chosen and how much of it, for the line of `source`."""
        return f"{len(self._examples)} samples"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.name, "data_sha256": self._files.digest, "scores": self.version, **self.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """What else a score depends on, ready for JSON: every setting that not all tasks have."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in COMMON]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}

    def examples(self) -> list[Example]:
        return self._examples

    @abstractmethod
    def make(self) -> list[Example]:
        """The chosen samples, in a fixed order. Called once."""

    @cached_property
    def _examples(self) -> list[Example]:
        return self.make()

    @cached_property
    def _files(self) -> Files:
        return self.read()

    def read(self) -> Files:
        """The files of `data`; of several on the hub only those that are chosen. Raises UserError without any."""
        sets = self.sets()
        if self.data != "hub" or not sets:
            return read_files(self.title, self.data, self.suffixes)
        files, origins = {}, []
        # of one set there is nothing to choose here, but maybe of its rows
        for name in chosen(self.title, "subset", self.subset if len(sets) > 1 else None, list(sets)):
            one = sets[name]
            rows, where = hub_rows(self.title, one.repo, one.config, one.split, self.revision)
            files |= Files.of_rows(where, name, rows).files
            origins.append(where)
        return Files("; ".join(dict.fromkeys(origins)), files)


class RowsTask(FilesTask):
    """Rows of JSONL files; a task says what is in one, makes its prompt and scores an answer.

    fields: names and types of a row's fields. One that may be null may be missing or empty, others may not.
    wrong_row: "refused": nothing runs if a row cannot be a sample; "failed": the row is recorded so, the others run.
    """

    fields: ClassVar[Mapping[str, Any]] = {}
    wrong_row: ClassVar[Literal["refused", "failed"]] = "refused"

    @abstractmethod
    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        """The sample of a row in which `problem` finds nothing. id, tags: of the sample."""

    def tags(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the table and the score must know of a row of the file `name`: at least its subset and category."""
        return {"subset": name, "category": "mean"}

    def problem(self, name: str, row: Mapping[str, Any]) -> str | None:
        """Why a row of the file `name` cannot be a sample, naming its field; None if it can."""
        return wrong(row, self.fields) or empty(row, self.fields)

    def arranged(self, rows: Rows) -> Rows:
        """The rows of a file, each with its place there, in the form that is read and the order that `limit` takes."""
        return rows

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """The chosen rows of every file, each with its place there, which no selection changes."""
        names = chosen(self.title, "subset", self.subset, list(self._files.files))
        return {name: self.arranged(list(enumerate(self._files.rows(name))))[: self.limit] for name in names}

    def make(self) -> list[Example]:
        examples = []
        for name, rows in self._rows.items():
            for number, row in rows:
                id, tags, problem = f"{name}/{number}", self.tags(name, row), self.problem(name, row)
                if problem and self.wrong_row == "refused":
                    raise UserError(f"{self._files.location(name, number)}: {problem}")
                examples.append(failed(id, tags, problem) if problem else self.example(id, tags, row))
        return examples


def failed(id: str, tags: dict[str, Any], problem: str) -> Example:
    """The sample of a row that cannot be run: it is recorded with its problem, and the others go on."""
    return Example(id, "", "", [], 1, tags, error=problem)
