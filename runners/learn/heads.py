"""What a method keeps of a prompt, by layer and KV head: what `python -m analysis.heads` draws."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from analysis.files import whole
from analysis.records import PROTOCOLS
from methods import build_method
from methods.core.binding.prepared import remember
from methods.core.contract import Method
from methods.core.errors import UserError
from methods.core.typed import Count, Folder
from runners.base import Runner
from runners.engine.generation import Prompts, through
from runners.engine.setting import check_protocol
from runners.model_setup import ModelSetup, plain
from runners.records.origins import command_of
from runners.records.provenance import commit
from runners.records.record import check_writable, digest
from runners.report import run_table as show
from runners.settings import auto
from runners.settings.parts import task_of
from tasks.base import Example

OUT = Path("outputs/heads")


@dataclass
class Heads(Runner):
    """The runner behind `python run.py runner=heads method=NAME`: a file per cell, JSON, for `analysis.heads`.

    samples: of the task, its first ones, each read alone.  out: folder of the files, null for outputs/heads.
    """

    samples: Count = 8
    out: Folder | None = None

    def run(self, cfg: DictConfig) -> int:
        """Reads the prompts, writes the file, returns 0. Raises UserError for what was given and cannot work."""
        name, words = HydraConfig.get().runtime.choices["method"], list(HydraConfig.get().overrides.task)
        out = Path(self.out).expanduser() if self.out else OUT
        check_writable(out, "runner.out")
        method, task = build_method(name, plain(cfg.method)), task_of(cfg)
        show.source(auto.told(task.name), task.source())
        setup = ModelSetup(cfg)
        task.fit(setup.encoder.tokens)
        asking = [one for one in task.examples() if not one.error and one.kind == "answer"][: self.samples]
        if not asking:
            raise UserError(f"runner=heads: task={task.name} asks no questions that are answered; give one that does")
        check_protocol(asking, cfg.protocol, [method], cfg.last_token)
        remember(setup.model, setup.tokenizer)
        looks: list[dict[str, Any]] = []
        with show.Bar(f"{name} at budget={method.budget:g}", len(asking)) as bar:
            for example in asking:
                looks.append(look_at(setup, method, example))
                bar.advance(1)
        about = {
            "model": setup.checkpoint.name,
            "task": task.name,
            "protocol": PROTOCOLS[cfg.protocol],
            "method": name,
            "budget": method.budget,
            "family": method.family,
            "config": method.config(),
            "command": command_of(name, words),
            "commit": commit(),
            "weights": setup.checkpoint.weights,
        }
        asked = digest({"config": about["config"], "protocol": cfg.protocol})
        path = out / setup.checkpoint.name / task.name / f"{name}-b{method.budget:g}-{asked}.json"
        with whole(path, "give another place as runner.out") as draft:
            draft.write_text(json.dumps({**about, **together(looks)}) + "\n", encoding="utf-8")
        show.say(f"{path}: drawn by python -m analysis.heads {out}")
        return 0


class Look(Prompts):
    """A prompt that is read and compressed; then its cache is looked at, and nothing is decoded."""

    found: dict[str, Any]

    def go_on(self, state: Any, outputs: torch.Tensor) -> None:
        """What the only row holds by layer and head."""
        (cache,) = (member.cache for member in state.members)
        layers = [layer.inner for layer in cache.layers]
        tokens = len(self.firsts[0])
        positions = [layer.positions() for layer in layers]
        held = [None if pos is None else _held(pos[0]) for pos in positions]
        self.found = {"tokens": tokens, "positions": held, "traits": [dict(layer.traits(0)) for layer in layers]}


def look_at(setup: ModelSetup, method: Method, example: Example) -> dict[str, Any]:
    """What a method holds of a sample's prompt.

    tokens: of it.  positions: by layer and KV head those of its slots, in order; None for a layer that has no such
    list.  traits: by layer.
    """
    plan = Look([setup.encoder(example).prompt], setup.cfg.protocol)
    through(setup.model, [method], plan, setup.cfg.chunk)
    return {"id": example.id, **plan.found}


def _held(pos: torch.Tensor) -> list[list[int]]:
    """The positions of a layer's slots [H, S], head by head, in order and without padding."""
    return [sorted(place for place in head if place >= 0) for head in pos.tolist()]


def together(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a file holds of several samples: kept shares by layer and head as means, the rest of the first sample.

    Positions are runs of neighbours: where each begins and how long it is, one after the other.
    """
    first = looks[0]
    kept: list[list[float] | None] = []
    for layer, held in enumerate(first["positions"]):
        if held is None:
            kept.append(None)
            continue
        shares = [[len(head) / one["tokens"] for head in one["positions"][layer]] for one in looks]
        kept.append([round(sum(heads) / len(looks), 5) for heads in zip(*shares, strict=True)])
    return {
        "samples": [one["id"] for one in looks],
        "tokens": [one["tokens"] for one in looks],
        "kept": kept,
        "traits": first["traits"],
        "positions": [None if held is None else [[*_runs(head)] for head in held] for held in first["positions"]],
    }


def _runs(places: Sequence[int]) -> Iterator[int]:
    """Runs of neighbours in what is in order: the first of each and its length."""
    begin = last = None
    for place in places:
        if last is not None and place == last + 1:
            last = place
            continue
        if begin is not None and last is not None:
            yield from (begin, last - begin + 1)
        begin = last = place
    if begin is not None and last is not None:
        yield from (begin, last - begin + 1)
