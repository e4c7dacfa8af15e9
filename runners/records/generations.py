"""Records of the same question by other code or other model files: which there are, and what has changed since.

A cell is what was asked for. Its generation is what answered: the code, the model's files, what a method has learned.
Each generation has a record of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import records
from methods.core.errors import UserError
from runners.records import provenance as revision
from runners.records.record import Record, asked, differences, generation_of, plain_name
from runners.records.renamed import same_but_for_names
from runners.records.stored import read_cell
from runners.report import run_table as show

if TYPE_CHECKING:
    from runners.cells import Cell

#: of a cell.json, what tells whether it is of the same question
FOUND = {
    "identity.model": records.OBJECT,
    "identity.task.fingerprint": records.OBJECT,
    "runs": records.RUNS,
}
SHOWN = 4  # changed modules or files that are named in a line


def _without(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An old identity with no more in its task than a new one: format 1 had all samples' hash there, and no `data`."""
    task, now = old["task"], new["task"]
    settings = {key: value for key, value in task["fingerprint"].items() if key in now["fingerprint"]}
    return {**old, "task": {**({"data": now["data"]} if "data" in now else {}), **task, "fingerprint": settings}}


@dataclass(frozen=True)
class StoredRecord:
    """A record on disk. identity, runs: of its cell.json.  age: of two records of a cell the newer has the larger."""

    folder: Path
    identity: dict[str, Any]
    runs: list[dict[str, Any]]
    age: tuple[str, float]

    @property
    def generation(self) -> dict[str, Any]:
        """By which code and files its last run answered."""
        return generation_of(self.identity, self.runs[-1])

    def as_named_then(self, conditions: dict[str, Any], modules: dict[str, str]) -> dict[str, Any]:
        """Conditions with the name that the code had in the record, where nothing but names has changed since.

        modules: of the present code.
        """
        modules_then, code = self.runs[-1].get("modules"), self.generation.get("code")
        if not isinstance(modules_then, dict) or not all(isinstance(digest, str) for digest in modules_then.values()):
            return conditions
        return {**conditions, "code": code} if same_but_for_names(modules_then, modules) else conditions

    def answers(self, identity: dict[str, Any], weights: str, location: str) -> bool:
        """Whether it is a record of what `identity` asks for; other weights are so at the same location only."""
        if _without(asked(self.identity), identity) != asked(identity):
            return False
        return self.generation.get("weights") == weights or self.runs[-1].get("place") == location

    def record(self, results: Path) -> Record:
        """It as a record of this results folder."""
        return Record(results, self.identity, folder=self.folder)


class Shelf:
    """The records of one model and task below a results folder; each is read when its method is first asked for."""

    def __init__(self, results: Path, model: str, task: str):
        self.results = results
        self.folder = results / plain_name(model) / plain_name(task)
        self._read: dict[str, StoredRecord | None] = {}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Folders by their name without its last part, which is a hash."""
        by_label: dict[str, list[str]] = {}
        try:
            for path in self.folder.iterdir():
                by_label.setdefault(path.name.rpartition("-")[0], []).append(path.name)
        except OSError:  # there is none yet, or it cannot be read, which writing will say
            return {}
        return by_label

    def record_for(
        self, identity: dict[str, Any], conditions: dict[str, Any], modules: dict[str, str], location: str, resume: str
    ) -> tuple[Record, StoredRecord | None, dict[str, Any]]:
        """The record that a cell is read from and written to, and the newest one that is older than the present code.

        And the conditions under which its samples are computed: those given, or with the code's earlier name.
        modules: of the present code.  location: where its model lies.
        """
        new = Record(self.results, identity, generation_of(identity, {"conditions": conditions}))
        current, older = [], []
        for one in self.of(new, conditions["weights"], location):
            named = one.as_named_then(conditions, modules)
            if one.generation == generation_of(identity, {"conditions": named}):
                current.append((one, named))
            else:
                older.append(one)
        before = older[-1] if older else None
        if before and (resume == "old" or (resume == "force" and not current)):
            return before.record(self.results), before, conditions
        if not current:
            return new, before, conditions
        one, named = current[-1]
        return one.record(self.results), before, named

    def of(self, record: Record, weights: str, location: str) -> list[StoredRecord]:
        """The records that answer the same question, oldest first."""
        names = self._names.get(record.folder.name.rpartition("-")[0], [])
        stored = [
            one for name in names if (one := self._open(name)) and one.answers(record.identity, weights, location)
        ]
        return sorted(stored, key=lambda one: one.age)

    def _open(self, name: str) -> StoredRecord | None:
        if name not in self._read:
            self._read[name] = _open(self.folder / name)
        return self._read[name]


def _open(folder: Path) -> StoredRecord | None:
    """A record; None for one that cannot be read, which is said when it is asked for itself."""
    try:
        book = read_cell(folder, FOUND)
        began, samples = book["runs"][-1].get("began", ""), folder / "samples.jsonl"
        written = samples.stat().st_mtime if samples.exists() else 0.0
    except (UserError, OSError):
        return None
    return StoredRecord(folder, book["identity"], book["runs"], (str(began), written))


def say_what_changed(cells: Sequence[Cell]) -> None:
    """One line for cells that begin a record beside an older one, which names what is not as it was for that."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.older is not None and not cell.record.cell_path.exists():
            alike.setdefault(what_changed(cell.older, cell.conditions, cell.notes), []).append(cell)
    for what, changed_cells in alike.items():
        assert changed_cells[0].older is not None
        who = changed_cells[0].label if len(changed_cells) == 1 else f"{len(changed_cells)} cells"
        since = changed_cells[0].older.folder.name if len(changed_cells) == 1 else "their records on disk"
        new = "a new record" if len(changed_cells) == 1 else "new records"
        show.note(f"{who}: changed since {since} ({what}); computed into {new}, resume=old shows the old")


def check_recorded(cell: Cell) -> None:
    """Raises UserError if nothing was recorded of a cell."""
    if not cell.record.samples_path.exists():
        where = cell.record.folder.parent
        raise UserError(
            f"resume=old: {where} has no record of {cell.label} as it is asked for; resume=auto computes it"
        )


def what_changed(old: StoredRecord, conditions: dict[str, Any], notes: dict[str, Any]) -> str:
    """What of the code and the model's files is not as it was for a record, in a few words."""
    said = []
    for kind, what in (("modules", "code"), ("files", "the model's files")):
        before, now = old.runs[-1].get(kind), notes.get(kind)
        if isinstance(before, dict) and isinstance(now, dict):
            names = revision.changed(before, now) if kind == "modules" else _differ(before, now)
            said += [f"{what}: {_some(names)}"] if names else []
    # a record of an earlier form names no modules and no files
    generation = {key: conditions[key] for key in conditions if key in old.generation}
    return "; ".join(said) or differences(old.generation, generation) or "the code"


def _differ(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
