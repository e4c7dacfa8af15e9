"""What a table of bits scores on a task, or stands to score by its layers' errors alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from methods.core.errors import UserError
from methods.kvtuner import KVTuner, Pair, Table
from runners.engine.generation import generate, together
from runners.engine.prompt import Encoder
from runners.engine.rows import REASONS
from runners.learn.bits.sensitivity import Shift
from runners.report import run_table as show
from tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scores:
    """Mean scores of tables on the examples, remembered in a file: a search that was stopped goes on."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: KVTuner,
        task: Task,
        encoder: Encoder,
        examples: Sequence[Example],
        cfg: DictConfig,
        path: Path,
    ):
        self.model, self.method, self.task, self.encoder = model, method, task, encoder
        self.examples, self.cfg, self.path = examples, cfg, path
        self.sign = 1 if task.metric.better == "higher" else -1
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.known: dict[str, float] = {row["table"]: row["score"] for row in map(json.loads, lines)}

    def __call__(self, tables: Sequence[Table]) -> list[float]:
        todo = {str_table(table): table for table in tables if str_table(table) not in self.known}
        if todo:
            scores = self._measure(list(todo.values()))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for name, score in zip(todo, scores, strict=True):
                    self.known[name] = score
                    file.write(json.dumps({"table": name, "score": score}) + "\n")
        return [self.known[str_table(table)] for table in tables]

    def _measure(self, tables: Sequence[Table]) -> list[float]:
        methods = [replace(self.method, table=as_entries(table)) for table in tables]
        totals = [0.0] * len(methods)
        with show.Bar(f"{len(self.known)} tables known, {len(tables)} more", len(self.examples)) as bar:
            for batch in _batches(self.examples, self.cfg.batch_size):
                for i, answers in enumerate(self._answer(methods, batch)):
                    for example, ids in zip(batch, answers, strict=True):
                        text, thoughts = self.encoder.said(example, ids)
                        if thoughts and self.encoder.reasoning == "off":
                            raise UserError(f"{example.id}: {REASONS}")
                        totals[i] += self.sign * self.task.score(example, text)
                bar.advance(len(batch))
        return [total / len(self.examples) for total in totals]

    def _answer(self, methods: Sequence[KVTuner], batch: Sequence[Example]) -> list[list[list[int]]]:
        """New tokens by method and example."""
        prompts = [self.encoder(example).prompt for example in batch]
        how = {
            "protocol": self.cfg.protocol,
            "chunk": self.cfg.chunk,
            "pad_id": self.encoder.tokenizer.pad_token_id or 0,
        }
        if self.method.changes_prompt:
            by_method = [generate(self.model, method, prompts, **how)[0] for method in methods]
            return [[answer.ids for answer in answers] for answers in by_method]
        outcomes = together(self.model, methods, prompts, **how)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [[answer.ids for answer in outcome.answers] for outcome in outcomes]


class OutputErrors:
    """Minus the sum of the layers' output errors: a stand-in for a score that needs no generation."""

    def __init__(self, shifts: Sequence[dict[Pair, Shift]]):
        self.shifts = shifts

    def __call__(self, tables: Sequence[Table]) -> list[float]:
        return [-sum(layer[pair].output for layer, pair in zip(self.shifts, table, strict=True)) for table in tables]


def str_table(table: Table) -> str:
    """The pairs of all layers in one line."""
    return " ".join(map(str, table))


def as_entries(table: Table) -> dict[int, dict[str, int]]:
    """The table as `method.table` takes it."""
    return {layer: {"nbits_key": pair.key, "nbits_value": pair.value} for layer, pair in enumerate(table)}


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
