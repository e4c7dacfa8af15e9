"""Many cells on the same samples: each prompt is read once for all cells that can share it, the rest run alone."""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from methods.core.errors import BudgetMiss, NotHere, UserError
from methods.core.home import COMMAND
from runners.cells import Cell, Run, in_batches, plain
from runners.engine.answer import answer_together, why_alone
from runners.engine.loading import Checkpoint, load_model
from runners.engine.problem import problem
from runners.engine.rows import failed, row_of
from runners.jobs import announced, unpack
from runners.memory import GroupSizes
from runners.records.generations import check_recorded, say_what_changed
from runners.records.sample_locks import SampleLocks
from runners.records.shared_record import SharedRecord
from runners.report import run_table as show
from runners.settings import auto
from runners.settings.check import check_config
from runners.settings.composing import NUMBERS, composer
from runners.settings.parts import task_of
from tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SweepCell:
    """A cell of a sweep on its way.

    words: its own overrides, as typed.  stopped: why it takes no further samples.
    """

    cell: Cell
    words: list[str]
    record: SharedRecord
    stopped: Exception | None = None


class Sweep:
    """The cells of one (model, task, protocol).

    cfg: the job's configuration; `cfg.cells` holds the overrides of each cell.
    """

    def __init__(self, cfg: DictConfig, results: Path):
        self.cfg, self.code = cfg, 0
        self.shared = [word for word in HydraConfig.get().overrides.task if not word.startswith("cells=")]
        self.members: list[SweepCell] = []
        if not cfg.cells:
            raise UserError("cells=[]: give at least one cell, such as cells=['method=nacl budget=0.5']")
        found = list(self._composed())
        if not found:
            return
        task = task_of(cfg)
        show.source(auto.told(task.name), task.source())
        first = found[0][-1]
        first.hydra.overrides.task = self.shared  # of which the command of the full cache is made
        self._begin(Run(first, task, results, "full", load=loaded))
        self.members = self._members(found)

    @classmethod
    def of(cls, run: Run) -> Sweep:
        """The cells of a single run as a sweep, for its plan."""
        sweep = cls.__new__(cls)
        sweep.cfg, sweep.code, sweep.shared = run.cfg, 0, list(HydraConfig.get().overrides.task)
        sweep._begin(run)
        sweep.members = [SweepCell(cell, [], sweep._record(cell)) for cell in run.cells]
        return sweep

    def _begin(self, run: Run) -> None:
        self.run = run
        self.failed = 0  # answers that were recorded as failed
        self.sizes = GroupSizes(run)

    def _composed(self) -> Iterator[tuple[list[str], str, dict[str, Any], DictConfig]]:
        """Each cell's own words, its method's name and knobs, and a configuration that it shares with others.

        One that cannot work is said and left out.
        """
        with composer(HydraConfig.get().overrides.hydra) as compose:
            for cell in self.cfg.cells:
                words = unpack(str(cell))
                try:
                    cfg, numbers = compose([*self.shared, *words])
                    for key in NUMBERS:
                        cfg[key] = numbers.get(key, self.cfg[key])
                    check_config(cfg)
                    knobs = plain(cfg.method)
                except (UserError, HydraException, OmegaConfBaseException) as error:
                    self._refuse(words, error)
                    continue
                yield words, cfg.hydra.runtime.choices["method"], knobs, cfg

    def _refuse(self, words: Sequence[str], error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what, self.code = ("left out", self.code) if isinstance(error, NotHere) else ("error", 2)
        show.note(f"{what}: {' '.join(words)}: {'; '.join(lines)}")

    def _members(self, found: Sequence[tuple[list[str], str, dict[str, Any], DictConfig]]) -> list[SweepCell]:
        """One member per record, the full cache first: the others are compared with it."""
        full = SweepCell(self.run.full, ["method=full"], self._record(self.run.full))
        members = {full.cell.record.folder: full}
        for words, name, knobs, _ in found:
            try:
                cell = self.run.cell_of(name, knobs, [*self.shared, *words])
            except (UserError, HydraException, OmegaConfBaseException) as error:
                self._refuse(words, error)
                continue
            members.setdefault(cell.record.folder, SweepCell(cell, words, self._record(cell)))
        return list(members.values())

    def _record(self, cell: Cell) -> SharedRecord:
        return SharedRecord(cell.record, cell.conditions, cell.notes, force=self.cfg.resume == "force")

    @property
    def sharing(self) -> list[SweepCell]:
        """Members that go through the prompt together."""
        return [member for member in self.members if self.why_alone(member) is None]

    @property
    def alone(self) -> list[SweepCell]:
        """Members that read every prompt by themselves."""
        return [member for member in self.members if self.why_alone(member) is not None]

    def why_alone(self, member: SweepCell) -> str | None:
        """Why a member cannot share its prompts with others; None if it can."""
        if self._examples_alone is not None:
            return self._examples_alone
        method = member.cell.method
        if method.edits_model:
            return "edits the model"
        return "changes the prompt itself" if method.changes_prompt else None

    @cached_property
    def _examples_alone(self) -> str | None:
        reasons = (why_alone(example) for example in self.run.examples)
        return next((reason for reason in reasons if reason is not None), None)

    def work(self) -> None:
        """Compute what the records lack. What cannot go on is kept in the member; Ctrl-C passes through."""
        lacking = []
        for member in self.members:
            with self._stops(member):
                member.record.refresh()
                if self.run.only_shows:
                    check_recorded(member.cell)
                elif self.lacking(member, self.run.examples):
                    member.record.check_conditions()
                    lacking.append(member.cell)
                else:
                    self.run.restore(member.cell)
        if self.run.only_shows:
            return
        say_what_changed(lacking)
        if self.sharing:
            self._work_together()
        if alone := [member for member in self.alone if self.lacking(member, self.run.examples)]:
            if self._examples_alone:
                show.note(f"{len(alone)} cells run alone: {self._examples_alone}")
            for member in alone:
                if not self._examples_alone:
                    show.note(f"{member.cell.label}: {self.why_alone(member)}, it runs alone")
                with self._stops(member):
                    self._own_run(member).complete(member.cell)
        for member in self.members:
            with self._stops(member):
                member.record.refresh()

    def _own_run(self, member: SweepCell) -> Run:
        """The run of a member that runs alone; with a model of its own if the method edits it."""
        if not member.cell.method.edits_model:
            return self.run
        own = copy.copy(self.run)
        own.load = load_model
        for made in ("model", "setting"):
            own.__dict__.pop(made, None)
        return own

    @contextlib.contextmanager
    def _stops(self, member: SweepCell) -> Iterator[None]:
        """What ends one member and none of the others."""
        try:
            yield
        except (UserError, BudgetMiss) as error:
            member.stopped = error

    @property
    def is_finished(self) -> bool:
        """Whether the records have all there is to compute."""
        for member in self.members:
            with self._stops(member):
                member.record.refresh()
        return not any(self.lacking(member, self.run.examples) for member in self.members)

    def lacking(self, member: SweepCell, examples: Sequence[Example]) -> list[Example]:
        """The examples that a member has no answer to yet; none for one that has stopped."""
        if member.stopped is not None or self.run.only_shows:
            return []
        found = ((example, row_of(member.record.rows, example)) for example in examples)
        return [example for example, row in found if row is None or "error" in row]

    def _work_together(self) -> None:
        todo = [example for example in self.run.examples if any(self.lacking(m, [example]) for m in self.sharing)]
        if not todo:
            return
        if len(todo) < len(self.run.examples):
            show.note(f"{len(self.run.examples) - len(todo)} of {len(self.run.examples)} samples are on disk")
        self.share(list(in_batches(todo, self.cfg.batch_size)), f"{len(self.sharing)} cells", _place())

    def share(self, batches: Sequence[Sequence[Example]], label: str, place: show.Place | None = None) -> None:
        """Answer batches, each read once for all sharing members that lack any of it; label, place: of the progress."""
        locks = SampleLocks(self.run.full.record.folder)
        try:
            with show.Bar(label, sum(map(len, batches)), place) as bar:
                for wait in (False, True):
                    left = []
                    for batch in batches:
                        with locks.hold([example.id for example in batch], wait) as got:
                            if not got:
                                left.append(batch)
                                continue
                            before = self.failed
                            self._batch(batch)
                            bar.advance(len(batch), self.failed - before)
                    if left:
                        show.note(f"another process computes {sum(map(len, left))} samples; waiting for them")
                    batches = left
        finally:
            locks.close()

    def _batch(self, batch: Sequence[Example]) -> None:
        """One batch for all members that lack any of it."""
        groups: dict[tuple[str, ...], tuple[list[Example], list[SweepCell]]] = {}
        for member in self.sharing:
            with self._stops(member):
                member.record.refresh()
            lacking = self.lacking(member, batch)
            bad = [failed(example, example.error) for example in lacking if example.error]
            if bad:
                self._add(member, bad)
            good = [example for example in lacking if not example.error]
            if good:
                groups.setdefault(tuple(example.id for example in good), (good, []))[1].append(member)
        for examples, members in groups.values():
            for part in self.sizes.split(members, examples):
                self._together(part, examples)

    def _together(self, members: list[SweepCell], examples: Sequence[Example]) -> None:
        """Run a group; a member that fails is tried once more alone, a group that is too large in two halves."""
        if len(members) > self.sizes.max_cells:
            return self._halves(members, examples)
        methods = [member.cell.method for member in members]
        wrong = None
        try:
            found = answer_together(self.run.setting, methods, examples, self.cfg.time_limit)
        except UserError:
            raise
        except Exception as error:
            wrong = problem(error)
            found = []
            if isinstance(error, torch.OutOfMemoryError) and len(members) > 1:
                self.sizes.max_cells = max(1, len(members) // 2)
            del error  # its traceback holds the tensors of the failed pass
        if wrong is not None:
            if self.run.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(members) > 1:
                show.note(f"{examples[0].id}: {wrong.line}; trying groups of {max(1, len(members) // 2)}")
                return self._halves(members, examples)
            return self._alone(members[0], examples)
        for member, rows in zip(members, found):
            if isinstance(rows, BudgetMiss):
                self._add(member, [failed(example, str(rows)) for example in examples])
                member.stopped = rows
            elif isinstance(rows, UserError):
                member.stopped = rows
            elif isinstance(rows, Exception) or any("error" in row for row in rows):
                self._alone(member, examples)
            else:
                self._add(member, rows)

    def _halves(self, members: list[SweepCell], examples: Sequence[Example]) -> None:
        half = (len(members) + 1) // 2
        for part in (members[:half], members[half:]):
            self._together(part, examples)

    def _alone(self, member: SweepCell, examples: Sequence[Example]) -> None:
        """Once more each sample by itself; what fails again is recorded as failed."""
        for example in examples:
            with self._stops(member):
                try:
                    (rows,) = answer_together(self.run.setting, [member.cell.method], [example], self.cfg.time_limit)
                except UserError:
                    raise
                except Exception as error:
                    problem(error)
                    rows = error.with_traceback(None)
                if isinstance(rows, (UserError, BudgetMiss)):
                    raise rows
                self._add(member, [failed(example, problem(rows))] if isinstance(rows, Exception) else rows)

    def _add(self, member: SweepCell, rows: Sequence[dict[str, Any]]) -> None:
        def say_waiting() -> None:
            show.note(f"{member.cell.label}: another process writes {member.cell.record.folder}; waiting for it")

        self.failed += sum("error" in row for row in rows)
        with self._stops(member):
            member.record.add(rows, say_waiting)

    def command(self, member: SweepCell) -> str:
        """The command that runs only what this cell lacks."""
        return f"{COMMAND} {shlex.join([*self.shared, *member.words])}"

    def failures(self, member: SweepCell) -> dict[str, str]:
        """Samples that failed, with their errors."""
        rows = self.run.own_rows(member.record.rows)
        return {id: row["error"] for id, row in rows.items() if "error" in row}


@lru_cache(maxsize=1)
def loaded(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, once for consecutive groups of a process."""
    return load_model(checkpoint, dtype, device)


def _place() -> show.Place | None:
    """Which of the sweep's groups this process works on; None where there is only one."""
    hydra = HydraConfig.get()
    groups, began = announced()
    if groups < 2:
        return None
    in_order = hydra.runtime.choices["hydra/launcher"] == "basic"
    return show.Place(hydra.job.num + 1, groups, began if in_order else None)
