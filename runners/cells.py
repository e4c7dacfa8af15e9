"""A cell, its record, and everything that computing its samples needs."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from analysis.records import PROTOCOLS
from methods import build_method, load_method
from methods.core import artefacts, home
from methods.core.binding.prepared import remember
from methods.core.contract import Method
from methods.core.errors import UserError
from runners.engine import answer, latency
from runners.engine.fidelity.panel import Panel
from runners.engine.generation import Prompt, generate
from runners.engine.loading import Checkpoint
from runners.engine.prompt import Encoder
from runners.engine.rows import failed, row_of
from runners.engine.setting import Setting, check_protocol
from runners.engine.sources.gguf_header import told_shares
from runners.model_setup import Loads, ModelSetup, plain
from runners.records.generations import Shelf, StoredRecord, check_recorded, say_what_changed
from runners.records.origins import command_of, kind_of, own_data, targets
from runners.records.provenance import Code, code_of, commit
from runners.records.record import Record, digest
from runners.report import run_table as show
from runners.settings import auto
from runners.settings.sampling import check_sampling, sampling_of, told
from tasks.base import Example, Task, as_parts, as_whole


@dataclass
class Cell:
    """A method and its record.

    notes: for the record's reader, never compared: commit, command, the method's family, whether it only simulates,
    what the task's average is a mean of, and what the hashes among the conditions are made of.
    older: the newest record of the same question that other code or model files have answered.
    """

    name: str
    method: Method
    record: Record
    conditions: dict[str, Any]
    notes: dict[str, Any]
    older: StoredRecord | None = None

    @property
    def label(self) -> str:
        """The method and its budget, as people read them."""
        return f"{self.name} at budget={self.method.budget:g}"


class Run(ModelSetup):
    """Everything one call works with, each part made when it is first needed.

    method: the name of the method that `cfg.method` describes.  load: where the model comes from.
    """

    rounds = True

    def __init__(
        self,
        cfg: DictConfig,
        task: Task,
        results: Path,
        method: str,
        load: Loads | None = None,
    ):
        super().__init__(cfg, load)
        self.task, self.results = task, results
        self.sampling = sampling_of(task, cfg.sampling)
        task.fit(lambda: self.encoder.tokens())
        self.examples = task.examples()
        check_sampling(self.sampling, self.examples)
        self.panel = Panel(cfg.fidelity or "off", self.examples)  # YAML reads off as false
        latency.check_lengths(self.examples, self.checkpoint.window)
        hydra = cfg.hydra if "hydra" in cfg else HydraConfig.get()
        words, self.taken = list(hydra.overrides.task), auto.named_by(hydra)
        self.full = self._cell("full", load_method("full").holding_in(self.cache_dtype), {}, words)
        self.cell = self.cell_of(method, plain(cfg.method), words)

    def cell_of(self, name: str, knobs: dict[str, Any], words: Sequence[str]) -> Cell:
        """The cell of another method or budget on the same samples. Raises UserError if it cannot work.

        knobs: the method's configuration, resolved.  words: the overrides that name the cell, as typed.
        """
        cell = self.full
        if name != "full":
            cell = self._cell(name, build_method(name, knobs).holding_in(self.cache_dtype), knobs, words)
        check_protocol(self.examples, self.cfg.protocol, [cell.method], self.cfg.last_token)
        return cell

    @property
    def cells(self) -> list[Cell]:
        """The full cache first: the others are compared with it; what is timed is compared within every sample."""
        if self.timed:
            return [self.cell]
        return [self.full] if self.cell is self.full else [self.full, self.cell]

    @property
    def timed(self) -> bool:
        """Whether the task takes times and nothing else."""
        return any(example.kind == "timed" for example in self.examples)

    @cached_property
    def setting(self) -> Setting:
        """What its samples are run in; loads the model."""
        if not self.timed:
            remember(self.model, self.tokenizer)
        return Setting(
            self.model,
            self.task,
            lambda: self.encoder,
            self.cfg.protocol,
            self.cfg.chunk,
            self.threads,
            self.cfg.time_limit,
            self.cfg.budget_miss,
            self.panel,
        )

    def settings(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
        """What the numbers depend on besides method and budget; samples may differ in their number of threads."""
        threads = sorted({row["threads"] for pair in pairs for row in pair})
        settings = {
            "protocol": PROTOCOLS[self.cfg.protocol],
            "dtype": self.dtype_name + (f" (from {told_shares(types)})" if (types := self.checkpoint.types) else ""),
            "device": self.device.type,
            "threads": " and ".join(map(str, threads)),
            "batch_size": self.cfg.batch_size,
        }
        more = {"cache.dtype": self.cache_dtype_name, "chunk": self.cfg.chunk, "last_token": self.cfg.last_token}
        settings |= {key: value for key, value in more.items() if value is not None}
        settings |= {f"sampling.{key}": value for key, value in told(self.sampling).items()}
        return ", ".join(f"{key}={value}" for key, value in settings.items())

    def rows(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What the cell's record has of this call's samples."""
        rows = cell.record.read()
        return self.own_rows(rows)

    def own_rows(self, rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What rows, by their keys, have of this call's samples, by their ids."""
        found = ((example.id, row_of(rows, example)) for example in self.examples)
        return {id: row for id, row in found if row is not None}

    def finished(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """The samples among them that did not fail."""
        return {id: row for id, row in self.rows(cell).items() if "error" not in row}

    def scored(
        self, ours: Mapping[str, dict[str, Any]], full: Mapping[str, dict[str, Any]], whole: bool = False
    ) -> list[tuple[Example, float, float]]:
        """What both have finished, for report.compare: (example, the method's score, the full cache's score).

        whole: each sample once. Else once for each part of its score that both have; what one alone has, since other
        code has scored it, is said.
        """
        counted = as_whole if whole else as_parts
        found: list[tuple[Example, float, float]] = []
        alone: dict[str, str] = {}  # name of a part -> a sample that has it in one record
        for example in self.examples:
            if example.id not in ours or example.id not in full:
                continue
            mine, theirs = (
                {str(part.tags.get("subset", "")): (part, score) for part, score in counted(example, rows[example.id])}
                for rows in (ours, full)
            )
            found += [(part, score, theirs[name][1]) for name, (part, score) in mine.items() if name in theirs]
            alone |= {name: example.id for name in mine.keys() ^ theirs.keys()}
        if alone:
            show.note(
                f"{', '.join(sorted(alone))} (such as {min(alone.values())}): in one of the two records only, which "
                "other code has scored, and so not compared; resume=auto computes both by the present code"
            )
        return found

    @cached_property
    def shelf(self) -> Shelf:
        """The records of this model and task."""
        return Shelf(self.results, self.checkpoint.name, self.task.name)

    @property
    def only_shows(self) -> bool:
        """Whether nothing is computed: records are shown as they are, old ones first."""
        return self.cfg.resume == "old"

    @property
    def is_finished(self) -> bool:
        """Whether the records have all there is to compute."""
        return self.only_shows or all(len(self.finished(cell)) == len(self.examples) for cell in self.cells)

    def complete(self, cell: Cell, left: Collection[str] = ()) -> None:
        """Compute what the cell's record lacks. Raises BudgetMiss at the first sample that holds too much.

        left: ids of samples that are computed elsewhere afterwards.
        With resume=old nothing is computed. Raises UserError then if there is no record.
        """
        if self.only_shows:
            check_recorded(cell)
            return

        if len(self.finished(cell)) == len(self.examples):
            self.restore(cell)
            return  # before anything is written: finished records may lie where nothing can be

        def say_waiting() -> None:
            show.note(f"{cell.name}: another process writes {cell.record.folder}; waiting for it")

        with cell.record.lock(say_waiting):
            done = self.finished(cell)
            todo = [example for example in self.examples if example.id not in done and example.id not in left]
            if not todo and not left:
                return
            cell.record.check_conditions(cell.conditions, force=self.cfg.resume == "force")
            say_what_changed([cell])
            if done:
                show.note(f"{cell.name}: {len(done)} of {len(self.examples)} samples are on disk")
            before = self.rows(cell)
            good = [example for example in todo if not example.error]
            with cell.record.begin(cell.conditions, cell.notes) as writer:
                for example in todo:
                    # unless the record already ends with the same failure
                    if example.error and before.get(example.id, {}).get("error") != example.error:
                        writer.append(failed(example, example.error))
                if good and not self.timed:  # which warms up by itself, and needs no tokenizer
                    self._warm_up(cell.method)
                with show.Bar(cell.name, len(good)) as bar:
                    for batch in in_batches(good, self.cfg.batch_size):
                        answer.answer(self.setting, cell.method, batch, writer.append)
                        bar.advance(len(batch))

    def restore(self, cell: Cell) -> None:
        """Write a cell.json again that was lost beside its samples, where it can be written."""
        if cell.record.runs() or not cell.record.samples_path.exists():
            return
        with contextlib.suppress(UserError):
            with cell.record.lock(lambda: None):
                cell.record.begin(cell.conditions, cell.notes).close()
            show.note(f"{cell.label}: {cell.record.cell_path} was missing or broken, and is written again")

    def _warm_up(self, method: Method) -> None:
        """Load the model and run a few tokens that nobody times: first calls of kernels and allocations are slow."""
        ids = self.encoder.tokenizer.encode("a prompt that nobody reads " * 8)[:32]
        warm = Prompt(ids, n_context=len(ids) // 2, max_new_tokens=2)
        try:
            generate(self.model, method, [warm], self.cfg.protocol)
        except UserError:
            raise
        except Exception as error:  # the samples will tell whether it concerns them
            show.note(f"{method.name}: the warm-up failed: {type(error).__name__}: {error}")

    def _cell(self, name: str, method: Method, knobs: Mapping[str, Any], words: Sequence[str]) -> Cell:
        code, said = self._code(method, knobs), self._fingerprint
        conditions = self._conditions(method, knobs, code.digest)
        identity = {
            "model": {"name": self.checkpoint.name, **self._prompting()},
            "method": {"name": name, "config": method.config()},
            "budget": method.budget,
            "task": {
                "name": self.task.name,
                "metric": dataclasses.asdict(self.task.metric),
                **({"data": data} if (data := own_data(self.task)) else {}),
                "fingerprint": {key: said[key] for key in said if key not in self.task.of_samples},
            },
            "protocol": self.cfg.protocol,
            "seed": method.seed,
            "dtype": self.dtype_name,
            # they change speeds and, through padding, bytes: what is compared was run the same way
            "passes": {
                "batch_size": self.cfg.batch_size,
                "chunk": self.cfg.chunk,
                **({"last_token": held} if (held := self.cfg.last_token) else {}),
                **({"sampling": drawn} if (drawn := told(self.sampling)) else {}),
                **({"cache_dtype": held_in} if (held_in := self.cache_dtype_name) else {}),
            },
        }
        notes = {
            "commit": commit(),
            **kind_of(method),
            "mean_over": self.task.mean_over,
            "command": command_of(name, [*words, *self.taken]),
            "samples": {key: said[key] for key in said if key in self.task.of_samples},
            "place": self.checkpoint.location,
            **({"dequantized_from": types} if (types := self.checkpoint.types) else {}),
            "modules": code.modules,
            "files": self.checkpoint.files,
        }
        record, older, conditions = self.shelf.record_for(
            identity, conditions, code.modules, self.checkpoint.location, self.cfg.resume
        )
        return Cell(name, method, record, conditions, notes, older)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return self.task.fingerprint

    def _prompting(self) -> dict[str, Any]:
        """The settings of the model that decide what its prompts look like, and what of its answers is scored."""
        model = self.cfg.model
        return {
            "max_length": self.max_length,
            "chat": bool(model.chat),
            "chat_options": plain(model.chat_options),
            **({"date": self.date} if self.date else {}),
            **({"reasoning": self.reasoning} if self.reasoning != "strip" else {}),
        }

    def _code(self, method: Method, knobs: Mapping[str, Any]) -> Code:
        """What computes the cell's samples: the method and its parts, the task, and the runners that answer."""
        # a class of each module that answers stands for the whole module
        parts = [type(method), type(self.task), answer.Pass, Encoder, Checkpoint]
        return code_of([*(f"{part.__module__}.{part.__qualname__}" for part in parts), *targets(knobs)])

    def _conditions(self, method: Method, knobs: Mapping[str, Any], code: str) -> dict[str, Any]:
        """What may change a number without being part of what was asked."""
        modules = map(home.plain, [type(method).__module__, *targets(knobs)])
        papers = [name.split(".")[1] for name in modules if name.startswith("methods.")]
        learned = artefacts.state(papers, str(self.checkpoint.source), knobs.values())
        return {
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
            "python": platform.python_version().rpartition(".")[0],
            "dtype": self.dtype_name,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "backend": self.backend,
            "weights": self.checkpoint.weights,
            **({"files": digest(files, 16)} if (files := self.checkpoint.files) else {}),
            "code": code,
            **({"artefacts": learned} if learned else {}),
        }


def in_batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """The examples in their order, so many at a time; the last batch may be smaller."""
    for at in range(0, len(examples), size):
        yield examples[at : at + size]
