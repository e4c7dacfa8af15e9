"""Train the reference model: tokenizer, generated documents, a curriculum of lengths, checkpoints, curves, export.

A run is determined by its configuration: rows are addressed by (seed, step, row), and a checkpoint holds weights,
optimizer and step, so a run that is killed at any moment continues as if nothing had happened. More or fewer tokens
than planned is one knob: give `tokens` again, and the learning rate cools down over the last `cooldown` of them.
"""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from methods.core.errors import UserError
from methods.core.typed import Count, Positive, Whole
from runners.base import Runner
from runners.learn.reference import blockwise
from runners.learn.reference.induction import write_circuit
from runners.learn.reference.packing import DataMix, Packer, pick_length
from runners.learn.reference.recall import ABILITIES, recall
from runners.learn.reference.token_bar import TokenBar
from runners.learn.reference.vocabulary import CORPUS, train_tokenizer
from runners.learn.training_log import cut_log, log_entry
from runners.records.record import check_writable
from runners.settings.trainers import trainer_of
from tasks.documents import prose_hash

CONF = Path(__file__).resolve().parents[3] / "conf" / "runner"
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass
class Stage:
    """Lengths of rows, one drawn per step, until `until` tokens were seen; `batch` tokens make one step.

    diet: arguments of `runners.learn.reference.packing.DataMix` that differ from its defaults.
    """

    until: Count
    lengths: list[Count]
    batch: Count = 4096
    diet: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        # plain types, whatever a configuration library makes of them: they are saved with every checkpoint
        self.lengths = list(self.lengths)
        self.diet = {k: _plain(v) for k, v in self.diet.items()}


@dataclass
class Train(Runner):
    """Train the reference model; every argument is a key of conf/runner/train.yaml.

    tokenizer_kinds, abilities: documents of the tokenizer, and what the curves show.
    out: folder of checkpoints, log and curves.  export: folder for the finished model, null for `out`/model.
    tokens: tokens to see in all.  cooldown: the last ones, over which the learning rate falls to zero.
    rates: learning rates [tokens seen, rate], a line from each to the next.  warmup: steps.
    precision: of the matrix products; auto is bfloat16 where the machine computes in it natively, else float32.
    save_every, recall_every: steps.  limit: steps of this call, null for all; the run can be continued.
    """

    out: str = "outputs/train/reference"
    export: str | None = None
    seed: Whole = 20260
    tokens: Count = 16_000_000
    cooldown: Whole = 2_000_000
    stages: list[Stage] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=lambda: [[0, 1.5e-3], [10_000_000, 5e-4]])
    warmup: Count = 30
    weight_decay: float = 0.05
    clip: Positive = 1.0
    width: Count = 256
    mlp: Count = 704
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 2
    head_width: Count = 64
    rope_base: Positive = 1e6
    window: Count = 4096
    vocabulary: Count = 2048
    tokenizer_documents: Count = 4000
    tokenizer_kinds: list[str] = field(default_factory=lambda: list(CORPUS))
    abilities: list[str] = field(default_factory=lambda: list(ABILITIES))
    precision: str = "auto"
    device: str = "auto"
    threads: Count | None = None
    save_every: Count = 100
    recall_every: Count = 250
    recall_documents: Count = 6
    limit: Count | None = None

    def __post_init__(self):
        self.stages = [s if isinstance(s, Stage) else Stage(**s) for s in self.stages]
        if not self.stages:
            raise UserError("train: runner.stages is empty; give at least one {until, lengths, batch}")
        self.rates = [list(point) for point in self.rates]
        pairs = self.rates and all(len(point) == 2 for point in self.rates)
        if not pairs or any(a[0] >= b[0] for a, b in pairwise(self.rates)):
            raise UserError(f"train: runner.rates={self.rates}; [tokens, rate] in the order of tokens, one at least")
        if self.precision not in PRECISIONS:
            raise UserError(f"train: runner.precision={self.precision}; one of {', '.join(PRECISIONS)}")
        if not 0 <= self.cooldown <= self.tokens:
            raise UserError(f"train: runner.cooldown={self.cooldown}; from 0 to runner.tokens={self.tokens}")
        for stage in self.stages:
            if max(stage.lengths) > self.window or stage.batch % max(stage.lengths):
                raise UserError(
                    f"train: stage until={stage.until} has lengths={stage.lengths}, batch={stage.batch}; lengths fit "
                    f"the window of {self.window}, and the batch is a multiple of the longest"
                )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self, cfg: Any = None) -> int:
        """Train or continue, then export; the exit code. What is trained is the method's, where its YAML says how."""
        if cfg is not None and (trainer := trainer_of(cfg.method, cfg.runner, OmegaConf.load(CONF / "train.yaml"))):
            return trainer.make().run(cfg)
        if self.threads:
            torch.set_num_threads(self.threads)
        out = Path(self.out)
        check_writable(out, "runner.out")
        tokenizer = self._tokenizer(out)
        model = LlamaForCausalLM(self.model_config(tokenizer)).to(torch.float32)
        write_circuit(model, self.seed)
        if self.device == "cpu":
            model.set_attn_implementation(blockwise.NAME)
        model.to(self.device)
        optimizer = self._optimizer(model)
        state = self._resume(out, model, optimizer)
        packer = Packer(tokenizer, self.seed)
        stop = state["step"] + self.limit if self.limit else None
        with TokenBar(self.tokens, state["tokens"]) as progress:
            while state["tokens"] < self.tokens and state["step"] != stop:
                self._step(model, optimizer, packer, state, out, progress)
                step = state["step"]
                if step % self.recall_every == 0:
                    self._measure(model, tokenizer, state, out)
                if step % self.save_every == 0:
                    self._save(out, model, optimizer, state)
        self._save(out, model, optimizer, state)
        if state["tokens"] < self.tokens:
            return 0
        if state["step"] % self.recall_every:
            self._measure(model, tokenizer, state, out)
        export = Path(self.export or out / "model")
        export_model(model, tokenizer, export)
        print(f"trained {state['tokens']:,} tokens in {state['seconds'] / 60:.0f} minutes; model in {export}")
        return 0

    def model_config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        """The architecture, with the tokenizer's size and special tokens."""
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_width,
            max_position_embeddings=self.window,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_base},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def learning_rate(self, step: int, tokens: int) -> float:
        """Warm-up over steps, lines from rate to rate, then down to zero at the very end."""
        seen, rates = zip(*self.rates)
        rate = float(np.interp(tokens, seen, rates)) * min(1.0, (step + 1) / self.warmup)
        return rate * min(1.0, max(self.tokens - tokens, 0) / self.cooldown if self.cooldown else 1.0)

    def stage_at(self, tokens: int) -> Stage:
        """The stage after `tokens` tokens; the last one goes on for ever."""
        return next((s for s in self.stages if tokens < s.until), self.stages[-1])

    def _step(self, model, optimizer, packer, state, out, progress) -> None:
        started = time.perf_counter()
        step, tokens = state["step"], state["tokens"]
        stage = self.stage_at(tokens)
        length = pick_length(np.random.default_rng([self.seed, step]), stage.lengths)
        mix = DataMix(**stage.diet)
        rows = [packer.row(step, r, length, mix) for r in range(stage.batch // length)]
        ids = torch.from_numpy(np.stack([r.ids for r in rows])).to(self.device)  # [B, L]
        weights = torch.from_numpy(np.stack([r.weights for r in rows])).to(self.device)  # [B, L]
        rate = self.learning_rate(step, tokens)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        counted = weights[:, 1:] > 0  # [B, L-1]
        weights = weights[:, 1:][counted]  # [N]
        with self._autocast():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, M]
            logits = model.lm_head(hidden[:, :-1][counted])  # [N, V]; only what counts: the head is costly
        losses = F.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"], state["tokens"] = step + 1, tokens + ids.numel()
        state["seconds"] += time.perf_counter() - started
        answers = losses.detach()[weights == 1.0]
        entry = {
            "step": state["step"], "tokens": state["tokens"], "length": length, "lr": rate, "norm": norm.item(),
            "loss": loss.item(), "answer_loss": answers.mean().item() if len(answers) else None,
            "seconds": state["seconds"],
        }  # fmt: skip
        log_entry(out / "log.jsonl", entry)
        progress.advance(
            ids.numel(),
            f"length {length:4d} loss {entry['loss']:.3f} {ids.numel() / (time.perf_counter() - started):,.0f} tok/s",
        )

    def _measure(self, model, tokenizer, state, out) -> None:
        length = max(self.stage_at(state["tokens"]).lengths)
        with self._autocast():
            counts = recall(
                model, tokenizer, length, self.recall_documents, turns=4, seed=self.seed, abilities=self.abilities
            )
        shares = {kind: right / max(1, asked) for kind, (right, asked) in counts.items()}
        log_entry(
            out / "log.jsonl", {"step": state["step"], "tokens": state["tokens"], "length": length, "recall": shares}
        )
        from runners.learn.reference.curves import draw_curves

        draw_curves(out / "log.jsonl", out / "curves.png")

    def _autocast(self):
        if self.precision == "float32" or (self.precision == "auto" and not _native_bf16(self.device)):
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def _optimizer(self, model) -> torch.optim.AdamW:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.rates[0][1], betas=(0.9, 0.95), fused=True)

    def _tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        folder = out / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            tokenizer = train_tokenizer(
                self.vocabulary, self.seed, self.tokenizer_documents, self.window, self.tokenizer_kinds
            )
            fresh = out / "tokenizer.new"
            tokenizer.save_pretrained(fresh)
            os.replace(fresh, folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _recipe(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued."""
        free = {"out", "export", "tokens", "cooldown", "device", "threads", "save_every", "recall_every"}
        free |= {"recall_documents", "limit", "precision", "abilities"}
        return {**{k: v for k, v in asdict(self).items() if k not in free}, "prose": prose_hash("train")}

    def _save(self, out: Path, model, optimizer, state: dict[str, Any]) -> None:
        fresh = out / "checkpoint.new"
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "state": state,
                "recipe": self._recipe(),
            },
            fresh,
        )
        os.replace(fresh, out / "checkpoint.pt")

    def _resume(self, out: Path, model, optimizer) -> dict[str, Any]:
        path = out / "checkpoint.pt"
        if not path.exists():
            (out / "log.jsonl").unlink(missing_ok=True)
            return {"step": 0, "tokens": 0, "seconds": 0.0}
        saved = torch.load(path, map_location=self.device, weights_only=True)
        asked = self._recipe()
        seen = saved["state"]["tokens"]
        for recipe in (asked, saved["recipe"]):  # what has not begun may change
            recipe["stages"] = _begun(recipe["stages"], [s["until"] for s in recipe["stages"]], seen)
            recipe["rates"] = _begun(recipe["rates"], [tokens for tokens, _ in recipe["rates"]], seen)
        other = [k for k in asked if saved["recipe"].get(k) != asked[k]]
        if other:
            raise UserError(f"train: {path} was made with another {', '.join(other)}; choose another runner.out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        cut_log(out / "log.jsonl", "step", saved["state"]["step"])
        return saved["state"]


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint: float16 safetensors, configurations, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()))
    half.load_state_dict(model.state_dict())
    half.to(torch.float16)
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    half.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, bos_token_id=bos, pad_token_id=pad)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _native_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _begun(plan: list[Any], ends: list[float], seen: int) -> list[Any]:
    """The parts of a plan in use until `seen` tokens were seen: the first, and those after an end that has passed."""
    return [part for i, part in enumerate(plan) if i == 0 or ends[i - 1] < seen]
