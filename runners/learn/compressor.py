"""Train LoCoCo's compressors for one model and one number of slots, with the model frozen.

    python run.py runner=train method=lococo budget=128

A row of text is read in the method's own chunks. Each chunk's loss is taken back through the compression that came
before the chunk, and no further: what is held is data. The paper's loss is that of the next token; what compression
costs is small beside what no cache could have predicted, so that by default the full cache's predictions are learned
instead, in which that part cancels. When all rows are read, the artefact is saved where the method looks for it, read
again, and compared on held-out text with dropping at equal slots. Saved are the weights that did best on a few held-out
rows, which the comparison leaves out. A run that was stopped goes on by the same command.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from methods import build_method
from methods.core import artefacts
from methods.core.errors import UserError
from methods.core.typed import Count, Positive, Whole
from methods.lococo import TRAINER, LoCoCo
from runners.base import Runner
from runners.learn.compression.held_out import compare_with_dropping, losses, predicted
from runners.learn.compression.text_rows import pick_rows, row_of, rows_of, split_text
from runners.learn.compression.training_figure import draw_training
from runners.learn.training_log import cut_log, log_entry
from runners.model_setup import ModelSetup
from runners.records.record import check_writable
from runners.report import run_table as show
from runners.settings import auto
from tasks.documents import prose
from tasks.documents.pools import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOSSES = ("full", "text")


@dataclass
class InTraining(LoCoCo):
    """LoCoCo with compressors that are being trained instead of saved ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compressors: nn.ModuleList | None = None

    def prepare(self, model: PreTrainedModel) -> nn.ModuleList | None:
        return self.compressors


@dataclass
class TrainCompressor(Runner):
    """Every argument is a key of the block `train:` of conf/method/lococo.yaml.

    out: folder of checkpoints and logs.  export: folder of the artefact, None for where the method looks for it.
    text: file to read; None: generated documents in turn with the prose that every Python carries.
    length: tokens per row.  batch: rows that are read together.  batches: how many of them.
    loss: "full" for the divergence from the full cache's predictions, "text" for that of the next token.
    accumulate: chunks per step of the optimizer.  lr, gate_lr: of the convolutions and of the gates, rising over
    `warmup` steps and falling to zero over the run.  init_std: of the convolutions' first weights.  init_gate: the
    gates' first value, None for method.normalizer_init.
    chosen_on, held_out: held-out rows that choose among the weights, and that the comparison is made on.
    measure_every: batches between measurements, and between checkpoints.
    limit: batches of this call, None for all.
    """

    out: str = "outputs/train/lococo"
    export: str | None = None
    text: str | None = None
    length: Count = 2048
    batch: Count = 4
    batches: Count = 60
    loss: str = "full"
    accumulate: Count = 1
    lr: Positive = 5e-2
    gate_lr: Positive = 5e-2
    warmup: Whole = 0
    init_std: float = 1.0
    init_gate: float | None = None
    chosen_on: Count = 8
    held_out: Count = 22
    measure_every: Count = 10
    limit: Count | None = None

    def __post_init__(self) -> None:
        for key in ("length", "batch", "batches", "accumulate", "chosen_on", "held_out", "measure_every"):
            if getattr(self, key) < 1:
                raise UserError(f"train: runner.{key}={getattr(self, key)}; give a whole number, 1 or more")
        if self.loss not in LOSSES:
            raise UserError(f"train: runner.loss={self.loss}; it is one of {', '.join(LOSSES)}")
        if self.text is not None and not Path(self.text).expanduser().is_file():
            raise UserError(f"train: runner.text={self.text}: no such file; give a text file, or null")

    def run(self, cfg: DictConfig) -> int:
        """Train or go on training, save, compare; the exit code."""
        name = HydraConfig.get().runtime.choices["method"]
        method = build_method(name, cast("dict[str, Any]", OmegaConf.to_container(cfg.method, resolve=True)))
        if not isinstance(method, LoCoCo) or method.request.is_off or method.eta == 0:
            raise UserError(
                f"method={name}, budget={cfg.budget}: has nothing to train; {TRAINER} makes the compressors of "
                "method=lococo for one number of slots, such as budget=128"
            )
        check_writable(Path(self.out), "runner.out")
        show.source(auto.told())
        setup = ModelSetup(cfg)
        return self.train(setup.model.requires_grad_(False), setup.tokenizer, method, int(cfg.seed))

    def train(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: LoCoCo, seed: int) -> int:
        """The same for a loaded model. Raises UserError when the text is too short for one row."""
        trained, held_out = self.rows(tokenizer, seed)
        first = 1 + method.max_slots // method.chunk  # chunks before the first compression
        per_row = -(-self.length // method.chunk) - first
        if any(len(rows) <= self.chosen_on for rows in held_out.values()) or per_row < 1:
            counts = ", ".join(f"{len(rows)} rows of {name}" for name, rows in held_out.items())
            raise UserError(
                f"train: runner.length={self.length}: there are {counts} to measure on, of which "
                f"runner.chosen_on={self.chosen_on} choose, with {max(per_row, 0)} compressions each; give a text of "
                f"more rows, of more than {first * method.chunk} tokens each"
            )
        choice = next(iter(held_out.values()))[: self.chosen_on].to(model.device)
        held_out = {name: rows[self.chosen_on :][: self.held_out].to(model.device) for name, rows in held_out.items()}
        at = Path(self.out) / artefacts.model_id(model) / method.artefact_name
        at.mkdir(parents=True, exist_ok=True)
        student = InTraining(**asdict(method))
        torch.manual_seed(seed)
        student.compressors = nets = student.new_compressors(model)
        for weight in (p for key, p in nets.named_parameters() if key.endswith("weight")):
            weight.data *= self.init_std
        if self.init_gate is not None:
            for net in nets:
                net.eta.data.fill_(self.init_gate)
        gates = [parameter for name, parameter in nets.named_parameters() if name.endswith("eta")]
        convs = [parameter for name, parameter in nets.named_parameters() if not name.endswith("eta")]
        groups = [{"params": convs, "lr": self.lr}, {"params": gates, "lr": self.gate_lr}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = self.batches * per_row // self.accumulate

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / max(1, self.warmup)) * max(0.0, 1 - step / max(1, steps))

        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        recipe = {key: value for key, value in asdict(self).items() if key not in ("out", "export", "limit")}
        recipe |= {
            "method": method.config(),
            "seed": seed,
            "model": artefacts.identity(model),
            "data": _hash(trained(0)),
        }
        state = _resume(at, nets, optimizer, decay, json.loads(json.dumps(recipe)))
        stop = self.batches if self.limit is None else min(self.batches, state["batch"] + self.limit)
        with show.Bar(f"train {method.artefact_name}", (stop - state["batch"]) * self.batch) as bar:
            while state["batch"] < stop:
                began = time.perf_counter()
                ids = trained(state["batch"]).to(model.device)
                loss = self._read(model, student, optimizer, decay, ids)
                state["batch"] += 1
                state["steps"] = decay.last_epoch
                state["seconds"] += time.perf_counter() - began
                log_entry(
                    at / "log.jsonl",
                    {"batch": state["batch"], "loss": loss, "seconds": state["seconds"], "eta": _gates(nets)},
                )
                if state["batch"] % self.measure_every == 0 or state["batch"] == self.batches:
                    nll = losses(model, student, choice, self.batch).mean().item()
                    log_entry(at / "log.jsonl", {"batch": state["batch"], "chosen_on": nll})
                    if nll < state["best"]:
                        state |= {"best": nll, "best_batch": state["batch"], "weights": _copy(nets)}
                    _save(at, nets, optimizer, decay, state, recipe)
                bar.advance(self.batch)
        _save(at, nets, optimizer, decay, state, recipe)
        if state["batch"] == self.batches:
            nets.load_state_dict(state["weights"])
            self._finish(model, method, nets, held_out, state, recipe, at)
        return 0

    def rows(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Callable[[int], Tensor], dict[str, Tensor]]:
        """Rows [batch, length] of the i-th batch, and held-out rows by the name of their text.

        Raises UserError when a file has no row to train on.
        """
        if self.text is not None:
            trained, held_out = (rows_of(tokenizer, text, self.length) for text in split_text(self.text))
            if not len(trained):
                raise UserError(
                    f"train: runner.text={self.text}: has no runner.length={self.length} tokens to train on"
                )
            return lambda i: pick_rows(trained, seed, i, self.batch), {Path(self.text).name: held_out}

        def mixed(split: Split, start: int, n: int) -> Tensor:
            return torch.stack([row_of(tokenizer, seed, start + i, self.length, split) for i in range(n)])

        held_out = mixed("held_out", 0, self.chosen_on + self.held_out)
        plain = rows_of(tokenizer, "\n\n".join(prose("held_out")), self.length)
        return lambda i: mixed("train", i * self.batch, self.batch), {"documents and prose": held_out, "prose": plain}

    def _read(
        self,
        model: PreTrainedModel,
        student: LoCoCo,
        optimizer: torch.optim.Optimizer,
        decay: torch.optim.lr_scheduler.LRScheduler,
        ids: Tensor,
    ) -> float:
        """Train on rows of tokens [B, length], chunk by chunk; the mean loss of the chunks behind a compression."""
        cache, chunk_losses = student.cache_for(model, prompt_len=ids.shape[1]), []
        wanted = predicted(model, ids).split(student.chunk, dim=1) if self.loss == "full" else None
        for i, chunk in enumerate(ids.split(student.chunk, dim=1)):
            layers = [layer.inner for layer in cache.layers]
            due = layers[0].due
            for layer in layers:
                layer.detach()
            with torch.set_grad_enabled(due):
                logits = model(chunk, past_key_values=cache, use_cache=True).logits
            if not due or chunk.shape[1] < 2:
                continue
            if wanted is None:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), chunk[:, 1:].flatten())
            else:
                ours, theirs = logits.float().log_softmax(-1).flatten(0, 1), wanted[i].flatten(0, 1)
                loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            (loss / self.accumulate).backward()
            chunk_losses.append(loss.item())
            if len(chunk_losses) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                decay.step()
        return sum(chunk_losses) / len(chunk_losses)

    def _finish(
        self,
        model: PreTrainedModel,
        method: LoCoCo,
        nets: nn.ModuleList,
        held_out: dict[str, Tensor],
        state: dict[str, Any],
        recipe: dict[str, Any],
        at: Path,
    ) -> None:
        """Save the artefact with what it is worth on held-out text, and say so."""
        tensors = {key: tensor.half() for key, tensor in nets.state_dict().items()}
        facts: dict[str, Any] = {
            "slots": method.slots,
            "chunk": method.chunk,
            "kernel_size": method.kernel_size,
            "hh_keep_rate": method.hh_keep_rate,
            "hidden_act": method.hidden_act,
            "local_len": method.local_len or 0,
            "gates": _gates(nets),
            "steps": state["steps"],
            "chosen_after": state["best_batch"],
            "training": {**recipe, "seconds": round(state["seconds"])},
        }
        facts["training"].pop("model")
        export = Path(self.export) if self.export else None
        path = artefacts.save("lococo", method.artefact_name, model, tensors, facts, export)
        # measured as it will be loaded: half precision, from the file
        saved = replace(method, artefact=str(path))
        facts["held_out"] = {
            name: compare_with_dropping(model, saved, rows, self.batch) for name, rows in held_out.items()
        }
        artefacts.save("lococo", method.artefact_name, model, tensors, facts, export)
        draw_training(at / "log.jsonl", facts["held_out"], path.with_suffix(".png"))
        for text, measured in facts["held_out"].items():
            for name, nll in measured["nll"].items():
                gain, low, high = measured["gain"].get(name, (math.nan,) * 3)
                said = "" if math.isnan(gain) else f", {gain:+.4f} nats above lococo ({low:+.4f} to {high:+.4f})"
                show.say(f"{text}, {name:>16}: held-out perplexity {math.e**nll:.3f}{said}")
        show.say(f"{state['batch'] * self.batch * self.length:,} tokens in {state['seconds'] / 60:.1f} minutes: "
                 f"{artefacts.shown(path)}")  # fmt: skip


def _hash(rows: Tensor) -> str:
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:16]


def _copy(nets: nn.ModuleList) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in nets.state_dict().items()}


def _gates(nets: nn.ModuleList) -> Sequence[float]:
    return [round(net.eta.item(), 4) for net in nets]


def _save(at: Path, nets: Any, optimizer: Any, decay: Any, state: dict[str, Any], recipe: dict[str, Any]) -> None:
    fresh = at / "checkpoint.new"
    parts = {"nets": nets.state_dict(), "optimizer": optimizer.state_dict(), "decay": decay.state_dict()}
    torch.save({**parts, "state": state, "recipe": json.dumps(recipe)}, fresh)
    os.replace(fresh, at / "checkpoint.pt")


def _resume(at: Path, nets: Any, optimizer: Any, decay: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """Where the run in this folder stands; one of another recipe is begun anew."""
    path, log = at / "checkpoint.pt", at / "log.jsonl"
    saved: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {"recipe": "{}"}
    if json.loads(saved["recipe"]) != recipe:
        log.unlink(missing_ok=True)
        return {"batch": 0, "steps": 0, "seconds": 0.0, "best": math.inf}
    nets.load_state_dict(saved["nets"])
    optimizer.load_state_dict(saved["optimizer"])
    decay.load_state_dict(saved["decay"])
    cut_log(log, "batch", saved["state"]["batch"])
    return saved["state"]
