"""Search tables of bits per layer for a model: profile, prune, group, search, and write what is on the front."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from methods import build_method
from methods.core import artefacts
from methods.core.bind import bind
from methods.core.errors import UserError
from methods.core.home import COMMAND
from methods.core.typed import Count, Folder, Positive
from methods.kvtuner import BITS, CARD, KVTuner, Pair, nominal_bits, table_yaml
from runners.base import Runner
from runners.engine.prompt import Encoded
from runners.engine.setting import check_last_token
from runners.learn.bits.bit_pairs import Group, group_layers
from runners.learn.bits.pareto_figure import draw_front
from runners.learn.bits.scores import OutputErrors, Scores, str_table
from runners.learn.bits.search import SAMPLERS, Trial, best_under, front, search_tables
from runners.learn.bits.sensitivity import RELATIVE, Shift, profile
from runners.model_setup import ModelSetup, plain
from runners.records.record import check_writable, digest
from runners.report import run_table as show
from runners.settings import auto
from runners.settings.parts import task_of
from runners.settings.sampling import sampling_of, told
from tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OBJECTIVES = ("score", "output_error")


@dataclass
class Tune(Runner):
    """The runner behind `python run.py runner=tune method=kvtuner`; every argument is a key of conf/runner/tune.yaml.

    bits: to choose from, for keys and for values.  profile_prompts, samples: of the task, its first ones.
    stride: take every so many-th sample of the task only, and leave the others unseen.
    relative: see `runners.learn.bits.sensitivity.shifts`.
    eps, min_samples, outliers: see `group_layers`.  limits: average bits, each with a search of its own of `trials`
    tables and a seed of its own; nothing above the highest is written.
    objective: "score" of the task, or "output_error", minus the sum of the layers' errors.
    at_once: tables that share one pass over a prompt.  out: folder, None for the one where the method looks.
    """

    bits: list[int] = field(default_factory=lambda: [8, 4, 2])
    profile_prompts: Count = 20
    relative: str = "elements"
    eps: Positive = 0.05
    min_samples: Count = 2
    outliers: str = "together"
    limits: list[float] = field(default_factory=lambda: [4, 6])
    trials: Count = 200
    sampler: str = "nsga2"
    samples: Count = 200
    stride: Count = 1
    objective: str = "score"
    at_once: Count = 16
    out: Folder | None = None

    def __post_init__(self) -> None:
        self.bits, self.limits = sorted(self.bits, reverse=True), list(self.limits)
        if not self.bits or not set(self.bits) <= set(BITS):
            raise UserError(f"tune: runner.bits={self.bits}; give some of {', '.join(map(str, BITS))}")
        if not self.limits or min(self.limits) < min(self.bits):
            raise UserError(f"tune: runner.limits={self.limits}; average bits, none below {min(self.bits)}")
        for key in ("profile_prompts", "samples", "stride", "trials", "at_once", "min_samples"):
            if not isinstance(value := getattr(self, key), int) or value < 1:
                raise UserError(f"tune: runner.{key}={value}; give a whole number, 1 or more")
        if self.eps <= 0:
            raise UserError(f"tune: runner.eps={self.eps}; give a distance above 0")
        for key, allowed in (
            ("sampler", SAMPLERS),
            ("objective", OBJECTIVES),
            ("outliers", ("together", "apart")),
            ("relative", RELATIVE),
        ):
            if getattr(self, key) not in allowed:
                raise UserError(f"tune: runner.{key}={getattr(self, key)}; it is one of {', '.join(allowed)}")

    def run(self, cfg: DictConfig) -> int:
        """Searches, writes tables, card and figure, returns 0. Raises UserError for what was given and cannot work."""
        name = HydraConfig.get().runtime.choices["method"]
        method = build_method(name, plain(cfg.method))
        if not isinstance(method, KVTuner):
            raise UserError(f"runner=tune: method={name} has no tables of bits; give method=kvtuner")
        task: Task = task_of(cfg)
        show.source(auto.told(task.name), task.source())
        if self.out:
            check_writable(Path(self.out).expanduser(), "runner.out")
        setup = ModelSetup(cfg)
        encoder = setup.encoder
        task.fit(encoder.tokens)
        asking = [example for example in task.examples() if not example.error and example.kind == "answer"]
        examples = asking[:: self.stride]
        if not examples:
            raise UserError(f"runner=tune: task={task.name} asks no questions that are answered; give one that does")
        model = setup.model

        prompts = [encoder(example).prompt.ids for example in examples[: self.profile_prompts]]
        shifts = profile(model, prompts, method.store, self.bits, self.relative)
        groups = group_layers(
            [{pair: shift.output for pair, shift in layer.items()} for layer in shifts],
            self.eps,
            self.min_samples,
            self.outliers,
        )
        for group in groups:
            show.say(f"layers {_ranges(group.layers)}: {', '.join(map(str, group.pairs))}")

        asked = examples[: self.samples]
        check_last_token(asked, cfg.protocol, cfg.last_token)
        if drawn := told(sampling_of(task, cfg.sampling)):
            raise UserError(
                f"runner=tune: sampling.temperature={drawn['temperature']:g}: tables are compared by their likeliest "
                "answers; give sampling.temperature=0"
            )
        # what was found before these settings were there was found with their defaults
        otherwise = {
            **({"last_token": cfg.last_token} if cfg.last_token else {}),
            **({"reasoning": encoder.reasoning} if encoder.reasoning != "strip" else {}),
        }
        about = {
            "weights": setup.checkpoint.weights,
            # what is read and what ends an answer, whatever the model's settings made of them
            "prompts": _digest_of([encoder(example) for example in asked]),
            "task": task.fingerprint,
            "samples": [example.id for example in asked],
            "method": {**replace(method, table=None, budget=1.0).config()},
            "protocol": cfg.protocol,
            "dtype": str(setup.dtype),
            "chunk": cfg.chunk,
            **otherwise,
        }
        path = Path(cfg.results).expanduser() / "tune" / f"{name}-{digest(about)}.jsonl"
        scores = Scores(model, method, task, encoder, asked, cfg, path)
        rate = scores if self.objective == "score" else OutputErrors(shifts)
        uniform = [(Pair(bits, bits),) * len(shifts) for bits in self.bits]
        alike = [Trial(table, nominal_bits(table), score) for table, score in zip(uniform, rate(uniform))]
        tried: list[Trial] = []
        best: dict[float, Trial] = {}
        for limit in self.limits:
            searched = search_tables(
                groups, rate, limit, self.trials, self.sampler, seed_of(cfg.seed, limit), self.at_once
            )
            tried += searched
            if best_under(searched, limit) is None:
                show.note(f"at most {limit:g} bits: none of the {len(searched)} tables searched is within; "
                          "give more runner.trials, or a higher limit")  # fmt: skip
            # tables of one pair for all layers were measured as well, and some are always within
            if winner := best_under([*searched, *alike], limit):
                best[limit] = winner
        pareto = front(trial for trial in [*tried, *alike] if trial.bits <= max(self.limits))
        facts = {
            "objective": self.objective,
            "mode": method.mode,
            "task": task.name,
            "task_fingerprint": task.fingerprint,
            "protocol": cfg.protocol,
            **otherwise,
            "samples": [example.id for example in asked],
            "profile_prompts": len(prompts),
            "command": _command(),
            "settings": {key: value for key, value in vars(self).items() if key != "out"},
            "store": method.config()["store"],
            "prefill_attends_dequantised": method.prefill_attends_dequantised,
            "seed": cfg.seed,
            "dtype": setup.dtype_name,
            "weights": setup.checkpoint.weights,
            "made_with": {package: metadata.version(package) for package in ("torch", "transformers", "optuna")},
        }
        out = Path(self.out).expanduser() if self.out else artefacts.folders("kvtuner", model)[0] / method.mode
        write_tables(out, model, method, facts, shifts, groups, tried, alike, pareto, best)
        for limit, trial in best.items():
            show.say(f"at most {limit:g} bits: {table_name(trial)}, score {trial.score:.4f}")
        for trial in alike:
            show.say(f"all layers {trial.table[0]}: score {trial.score:.4f}")
        n = len({trial.table for trial in [*tried, *alike]})
        show.say(f"{len(pareto)} tables on the front of {n} tried: {artefacts.shown(out)}")
        return 0


def write_tables(
    out: Path,
    model: PreTrainedModel,
    method: KVTuner,
    facts: dict[str, Any],
    shifts: Sequence[dict[Pair, Shift]],
    groups: Sequence[Group],
    tried: Sequence[Trial],
    alike: Sequence[Trial],
    pareto: Sequence[Trial],
    best: dict[float, Trial],
) -> None:
    """The tables of the Pareto front (`pareto`), a card and a figure, in place of what the folder held."""
    width = bind(model).head_dim

    def row(trial: Trial, name: str) -> dict[str, Any]:
        effective = method.effective_bits(trial.table, width)
        numbers = {"bits": trial.bits, "effective_bits": effective, "score": trial.score}
        return {"name": name, **numbers, "table": str_table(trial.table)}

    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.yaml"):
        old.unlink()
    for trial in pareto:
        (out / f"{table_name(trial)}.yaml").write_text(table_yaml(trial.table), encoding="utf-8")
    card = {
        "method": "kvtuner",
        **facts,
        "groups": [{"layers": list(group.layers), "pairs": list(map(str, group.pairs))} for group in groups],
        "tables": [row(trial, table_name(trial)) for trial in pareto],
        "best": {f"{limit:g} bits": table_name(trial) for limit, trial in best.items()},
        "uniform": [row(trial, str(trial.table[0])) for trial in alike],
        "tables_tried": len({trial.table for trial in [*tried, *alike]}),
        "profile": [{str(pair): vars(shift) for pair, shift in layer.items()} for layer in shifts],
        "model": artefacts.identity(model),
    }
    part = out / f"{CARD}.{os.getpid()}.tmp"
    part.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    part.replace(out / CARD)
    draw_front(tried, alike, pareto, facts["mode"], out / "front.png")


def seed_of(seed: int, limit: float) -> int:
    """The seed of one limit's search: searches of the same seed would draw the same tables first."""
    return zlib.crc32(f"{seed}/{limit:g}".encode())


def _digest_of(encoded: Sequence[Encoded]) -> str:
    prompts = [one.prompt for one in encoded]
    return digest([[p.ids, p.n_context, p.ends, p.max_new_tokens, p.min_new_tokens] for p in prompts])


def table_name(trial: Trial) -> str:
    """As the paper names tables: by their average bits."""
    return f"C{trial.bits:.2f}"


def _command() -> str:
    """What was typed, without what only says where and how fast."""
    typed = HydraConfig.get().overrides.task
    elsewhere = ("results=", "threads=", "device=", "runner.out=", "model.path=")
    return " ".join([COMMAND, *(word for word in typed if not word.startswith(elsewhere))])


def _ranges(layers: Sequence[int]) -> str:
    """Layers as people write them: 0, 3-5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
