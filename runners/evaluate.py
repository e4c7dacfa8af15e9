"""Answer a task's samples with a method and with the full cache, score both, record every sample, print the table."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from methods import build_method, load_method
from methods.core.contract import Method
from methods.core.errors import BudgetMiss, UserError
from runners import answer, show
from runners.compare import compare
from runners.generate import Prompt, generate
from runners.load import Checkpoint, find, load_model, load_tokenizer, pick_device, pick_dtype, pick_threads
from runners.prompt import Encoder
from runners.record import Record, check_writable
from runners.revision import code_revision, commit
from tasks.base import Example, Task, as_parts

if TYPE_CHECKING:
    # importing the library's models takes seconds, and what is on disk is shown without them
    from transformers import PreTrainedModel

# failed samples that are named on screen; the record has them all
SHOWN_FAILURES = 3


@dataclass
class Evaluate:
    """The runner behind `python run.py`: one cell and, for comparison, the full cache on the same samples.

    resamples: bootstrap resamples behind the intervals.
    """

    resamples: int = 2000

    def run(self, cfg: DictConfig) -> int:
        """The exit code: 0, 1 if a sample failed or the budget was missed, 130 after Ctrl-C.

        Raises UserError for what the user gave and cannot work; finished samples are kept in every case.
        """
        results = Path(cfg.results).expanduser()
        check_writable(results)
        task: Task = instantiate(cfg.task)
        show.say(task.source())
        run = Run(cfg, task, results)
        try:
            return self._cells(run)
        except KeyboardInterrupt:
            done = len(run.finished(run.cell)) if run.cell.method is not run.full.method else 0
            kept = f"{len(run.finished(run.full))} samples of the full cache"
            if run.cell.method is not run.full.method:
                kept += f" and {done} of {run.cell.name}"
            show.note(f"stopped; {kept} are kept in {results}, the same command goes on from there")
            return 130

    def _cells(self, run: Run) -> int:
        for cell in run.cells:
            try:
                run.complete(cell)
            except BudgetMiss as miss:
                show.note(f"failed: budget={run.cfg.budget} is missed: {miss}")
                return 1
        return self._report(run)

    def _report(self, run: Run) -> int:
        ours, full = run.finished(run.cell), run.finished(run.full)
        both = [example for example in run.examples if example.id in ours and example.id in full]
        label = "" if run.cell is run.full else run.cell.name
        if both:
            scored = [
                (part, score, reference)
                for example in both
                for (part, score), (_, reference) in zip(
                    as_parts(example, ours[example.id]), as_parts(example, full[example.id]), strict=True
                )
            ]
            rows = compare(run.task, scored, self.resamples, seed=0)
            show.draw(show.scores(rows, label))
            for line in [
                *show.about(run.task.metric),
                *run.task.remarks([(example, ours[example.id], full[example.id]) for example in both]),
            ]:
                show.say(line)
            pairs = [(ours[example.id], full[example.id]) for example in both]
            show.draw(show.costs(cost_rows(pairs), label))
            cut = sum(row["cut"] for row, _ in pairs)
            show.say(f"{run.settings(pairs)}; {cut} of {len(both)} samples cut in the middle")
            if run.cell.method.simulated:
                show.say(f"{run.cell.name} only simulates its saving: bytes and speeds are not those of a real one")
        show.say(f"record: {run.cell.record.folder}")
        return self._failures(run)

    def _failures(self, run: Run) -> int:
        code = 0
        for cell in run.cells:
            failed = {id: row["error"] for id, row in run.rows(cell).items() if "error" in row}
            if not failed:
                continue
            named = "; ".join(f"{id} ({error})" for id, error in list(failed.items())[:SHOWN_FAILURES])
            more = f"; {len(failed) - SHOWN_FAILURES} more in the record" if len(failed) > SHOWN_FAILURES else ""
            show.note(
                f"failed: {len(failed)} of {len(run.examples)} samples with {cell.name}: {named}{more}; "
                "the same command tries them again"
            )
            code = 1
        return code


@dataclass
class Cell:
    """A method and its record."""

    name: str
    method: Method
    record: Record
    conditions: dict[str, Any]


class Run:
    """Everything one call works with, each part made when it is first needed."""

    def __init__(self, cfg: DictConfig, task: Task, results: Path):
        self.cfg, self.task, self.results = cfg, task, results
        self.checkpoint = find(str(cfg.model.path), str(cfg.model.revision))
        task.fit(lambda: self.encoder.tokens())
        self.examples = task.examples()
        self.device = pick_device(str(cfg.device))
        self.dtype = pick_dtype(str(cfg.dtype), self.checkpoint, self.device)
        self.threads = pick_threads(cfg.threads)
        self.full = self._cell("full", load_method("full"), 1)
        name = HydraConfig.get().runtime.choices["method"]
        self.cell = self.full
        if name != "full":
            method = build_method(name, _plain(cfg.method))
            self.cell = self._cell(name, method, method.budget)
        answer.check(self.examples, self.cfg.protocol, [cell.method for cell in self.cells])

    @property
    def cells(self) -> list[Cell]:
        """The full cache first: the others are compared with it."""
        return [self.full] if self.cell is self.full else [self.full, self.cell]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.checkpoint)
        ends = self.checkpoint.ends | ({tokenizer.eos_token_id} - {None})
        model = self.cfg.model
        return Encoder(
            tokenizer,
            ends=sorted(ends),
            max_length=self.checkpoint.max_length(model.max_length),
            window=self.checkpoint.window,
            chat=bool(model.chat),
            chat_options=_plain(model.chat_options),
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        torch.set_num_threads(self.threads)
        return load_model(self.checkpoint, self.dtype, self.device)

    @cached_property
    def setting(self) -> answer.Setting:
        return answer.Setting(self.model, self.task, self.encoder, self.cfg.protocol, self.cfg.chunk, self.threads)

    def settings(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
        """What the numbers depend on besides method and budget; samples may differ in their number of threads."""
        threads = sorted({row["threads"] for pair in pairs for row in pair})
        settings = {
            "protocol": self.cfg.protocol,
            "dtype": self.dtype_name,
            "device": self.device.type,
            "threads": " and ".join(map(str, threads)),
            "batch_size": self.cfg.batch_size,
        }
        if self.cfg.chunk is not None:
            settings["chunk"] = self.cfg.chunk
        return ", ".join(f"{key}={value}" for key, value in settings.items())

    def rows(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What the cell's record has of this call's samples."""
        rows = cell.record.read()
        return {example.id: rows[example.id] for example in self.examples if example.id in rows}

    def finished(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """The samples among them that did not fail."""
        return {id: row for id, row in self.rows(cell).items() if "error" not in row}

    def complete(self, cell: Cell) -> None:
        """Compute what the cell's record lacks. Raises BudgetMiss at the first sample that holds too much."""

        def say_waiting() -> None:
            show.note(f"{cell.name}: another process writes {cell.record.folder}; waiting for it")

        with cell.record.lock(say_waiting):
            done = self.finished(cell)
            todo = [example for example in self.examples if example.id not in done]
            if not todo:
                return
            cell.record.check(cell.conditions, force=self.cfg.resume == "force")
            if done:
                show.note(f"{cell.name}: {len(done)} of {len(self.examples)} samples are on disk")
            before = self.rows(cell)
            good = [example for example in todo if not example.error]
            with cell.record.begin(cell.conditions, {"commit": commit()}) as writer:
                for example in todo:
                    # unless the record already ends with the same failure
                    if example.error and before.get(example.id, {}).get("error") != example.error:
                        writer.append(answer.failed(example, example.error))
                if good:
                    self._warm_up(cell.method)
                with show.Bar(cell.name, len(good)) as bar:
                    for batch in _batches(good, self.cfg.batch_size):
                        answer.answer(self.setting, cell.method, batch, writer.append)
                        bar.advance(len(batch))

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

    def _cell(self, name: str, method: Method, budget: float) -> Cell:
        identity = {
            "model": {"name": _name(self.checkpoint), "weights": self.checkpoint.weights, **self._prompting()},
            "method": {"name": name, "config": method.config()},
            "budget": budget,
            "task": {
                "name": self.task.name,
                "metric": dataclasses.asdict(self.task.metric),
                "fingerprint": self.task.fingerprint,
            },
            "protocol": self.cfg.protocol,
            "seed": method.seed,
            "dtype": self.dtype_name,
            # they change speeds and, through padding, bytes: what is compared was run the same way
            "passes": {"batch_size": self.cfg.batch_size, "chunk": self.cfg.chunk},
        }
        return Cell(name, method, Record(self.results, identity), self._conditions(method))

    def _prompting(self) -> dict[str, Any]:
        """The settings of the model that decide what its prompts look like."""
        model = self.cfg.model
        return {
            "max_length": self.checkpoint.max_length(model.max_length),
            "chat": bool(model.chat),
            "chat_options": _plain(model.chat_options),
        }

    def _conditions(self, method: Method) -> dict[str, Any]:
        """What may change a number without being part of what was asked."""
        modules = [type(method).__module__, *_targets(_plain(self.cfg.method)), type(self.task).__module__]
        own = [f"runners.{name}" for name in ("answer", "generate", "prompt", "bind", "meter")]
        return {
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
            "python": platform.python_version().rpartition(".")[0],
            "dtype": self.dtype_name,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "code": code_revision([*modules, *own]),
        }


def cost_rows(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """Bytes and speeds of samples (the method's row, the full cache's row): (what, the method's, the full cache's).

    Bytes are means per sample, with their share of what a full cache of the same tokens takes; speeds are medians.
    """
    ours, full = _costs([row for row, _ in pairs]), _costs([row for _, row in pairs])
    return [(what, ours[what], full[what]) for what in ours]


def _costs(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One column of the table: what was measured, and its mean or median over samples."""
    found = {}
    for what, key, whole in (
        ("KV bytes, end of prompt", "held_prompt", "full_prompt"),
        ("KV bytes, end of generation", "held_end", "full"),
    ):
        held, of = (fmean(row["ledger"][name] / row["batch"] for row in rows) for name in (key, whole))
        found[what] = f"{show.size(held)} ({held / of:.1%})"
    times = [row["timings"] for row in rows]
    found["prefill, tokens/s"] = f"{median(time['n_prompt'] / time['prompt'] for time in times):,.0f}"
    steps = [1000 * time["decode"] / time["steps"] for time in times if time["steps"]]
    found["decode, ms/token"] = f"{median(steps):.2f}" if steps else "-"
    return found


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for at in range(0, len(examples), size):
        yield examples[at : at + size]


def _targets(node: Any) -> list[str]:
    """Every `_target_` in a configuration, at any depth."""
    if not isinstance(node, dict):
        return []
    own = [node["_target_"]] if "_target_" in node else []
    return own + [target for value in node.values() for target in _targets(value)]


def _plain(node: Any) -> Any:
    """A configuration node as plain containers."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _name(checkpoint: Checkpoint) -> str:
    """The checkpoint's folder or repository, without what stands above it."""
    return os.path.basename(os.path.normpath(checkpoint.path if checkpoint.commit else checkpoint.folder))
