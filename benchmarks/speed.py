"""Time of the cache itself: full, snapkv and nacl against plain transformers, in one run, on a CPU.

    python benchmarks/speed.py                       # a table, and benchmarks/results/speed-cpu.json
    python benchmarks/speed.py --models reference --threads 1 --rounds 2 --out /dev/null

Every round runs all variants one after the other, in an order that changes from round to round, and a ratio is
formed inside its round: what else the machine does hits both sides. Printed: median of the rounds' ratios, and
their lowest and highest. One thread is timed by the time that it had the processor, so that other work on the machine
counts little; several threads are timed by the wall clock and want an idle machine.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# run as a file, only its own folder would be on the path, where transformers would take kernels.py for `kernels`
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from methods import load_method  # noqa: E402

BUDGET = 0.25
# (what is measured, phase, variant, against, the goal as text, the highest ratio that meets it)
GOALS = [
    ("full against DynamicCache", "prefill", "full", "transformers", "<= 1.05", 1.05),
    ("full against DynamicCache", "decode", "full", "transformers", "<= 1.05", 1.05),
    ("snapkv against full", "prefill", "snapkv", "full", "<= 1.10", 1.10),
    ("nacl against full", "prefill", "nacl", "full", "<= 1.10", 1.10),
    (f"snapkv {BUDGET} against full", "decode", "snapkv", "full", "< 1", 1.0),
    (f"nacl {BUDGET} against full", "decode", "nacl", "full", "< 1", 1.0),
]


@dataclass
class Times:
    """Seconds per round: the whole prompt pass, and the median decode step."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def reference_model() -> Any:
    """The bundled reference model, float32."""
    return AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "reference", dtype=torch.float32).eval()


def llama_100m() -> Any:
    """A random Llama: 12 layers, 12 query heads on 4 KV heads, 101M parameters, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float().eval()


MODELS: dict[str, Callable[[], Any]] = {"reference": reference_model, "llama-100m": llama_100m}


class Sequence:
    """One variant's greedy sequence, batch 1, timed pass by pass."""

    def __init__(self, model: Any, cache: Any, clock: Callable[[], float]):
        self.model, self.cache, self.clock = model, cache, clock
        self.n = 0
        self.token = torch.empty(0)

    @torch.inference_mode()
    def feed(self, ids: torch.Tensor) -> float:
        """Seconds that ids [1, T] take, the choice of the next token included."""
        start = self.clock()
        position = torch.arange(self.n, self.n + ids.shape[1])[None]
        out = self.model(ids, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        self.n += ids.shape[1]
        return self.clock() - start

    def step(self) -> float:
        """Seconds of one decode step."""
        return self.feed(self.token)


def measure(name: str, length: int, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Times of every variant on one model. The plain variant runs on a copy that is never bound."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    plain = MODELS[name]()
    ours = copy.deepcopy(plain)
    length = min(length, plain.config.max_position_embeddings - steps)
    ids = torch.randint(3, plain.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    variants: dict[str, tuple[Any, Callable[[], Any]]] = {
        "transformers": (plain, lambda: DynamicCache(config=plain.config)),
        "full": (ours, lambda: load_method("full").cache_for(ours)),
        "snapkv": (ours, lambda: load_method("snapkv", budget=BUDGET).cache_for(ours)),
        "nacl": (ours, lambda: load_method("nacl", budget=BUDGET).cache_for(ours)),
    }
    times = {variant: Times() for variant in variants}
    for model, make in variants.values():  # warm-up: allocator, thread pool, lazy imports
        warm = Sequence(model, make(), clock)
        warm.feed(ids[:, :256])
        warm.step()
    order = list(variants)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        running = {variant: Sequence(model, make(), clock) for variant, (model, make) in variants.items()}
        for variant in order:
            times[variant].prefill.append(running[variant].feed(ids))
        each: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(steps):  # all variants take turns, token by token
            for variant in order:
                each[variant].append(running[variant].step())
        for variant in variants:
            times[variant].decode.append(statistics.median(each[variant]))
            prefill, decode = times[variant].prefill[-1], times[variant].decode[-1]
            print(
                f"  round {round_ + 1}/{rounds} {variant:13} prefill {prefill:7.2f} s  decode {decode * 1e3:7.2f} ms",
                flush=True,
            )
    ratios = []
    for what, phase, variant, against, goal, limit in GOALS:
        each_round = [a / b for a, b in zip(getattr(times[variant], phase), getattr(times[against], phase))]
        median = statistics.median(each_round)
        met = median < limit if goal.startswith("< ") else median <= limit
        ratios.append(
            {
                "what": what,
                "phase": phase,
                "goal": goal,
                "median": round(median, 4),
                "low": round(min(each_round), 4),
                "high": round(max(each_round), 4),
                "met": met,
            }
        )
    return {
        "model": name,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall",
        "parameters": sum(p.numel() for p in plain.parameters()),
        "tokens": length,
        "decode_steps": steps,
        "rounds": rounds,
        "seconds": {variant: {"prefill": t.prefill, "decode": t.decode} for variant, t in times.items()},
        "ratios": ratios,
    }


def harness(model_path: str, limit: int) -> dict[str, Any]:
    """Share of an evaluation's time that is not the model's: reading, tokenizing, scoring, recording.

    Runs method=nacl and its full cache over the bundled split; the model and its cache are inside the model's time.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from runners.cells import Run
    from runners.settings.parts import task_of

    inside = 0.0
    with tempfile.TemporaryDirectory() as results, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [f"model.path={model_path}", f"task.limit={limit}", f"results={results}"]
        cfg = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        run = Run(cfg, task_of(cfg), Path(results), cfg.hydra.runtime.choices["method"])
        forward = run.model.forward

        @wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            out = forward(*args, **kwargs)
            inside += time.perf_counter() - start
            return out

        run.model.forward = timed
        assert run.encoder  # the tokenizer is loaded before the clock starts
        start = time.perf_counter()
        for cell in run.cells:
            run.complete(cell)
        total = time.perf_counter() - start
        failed = sum("error" in row for cell in run.cells for row in run.rows(cell).values())
        samples = sum(len(run.finished(cell)) for cell in run.cells)
    return {"samples": samples, "failed": failed, "seconds": total, "outside_the_model": 1 - inside / total}


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(int(memory) / 2**20, 1)}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def show(result: dict[str, Any]) -> None:
    """Print a model's ratios and whether they meet their goals."""
    print(f"\n{result['model']}, {result['tokens']} tokens, {result['threads']} thread(s), {result['rounds']} rounds")
    for row in result["ratios"]:
        verdict = "met" if row["met"] else "MISSED"
        print(
            f"  {row['what']:27} {row['phase']:8} {row['median']:6.3f}  ({row['low']:.3f} to {row['high']:.3f})"
            f"  goal {row['goal']:8} {verdict}"
        )


def main() -> None:
    """Time prefill and decoding; prints tables and writes the JSON."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--models", default="reference,llama-100m", help=f"any of {', '.join(MODELS)}")
    ask.add_argument("--threads", default="2,1", help="thread counts, in the order of their turns")
    ask.add_argument("--length", type=int, default=4096, help="prompt tokens")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--steps", type=int, default=24, help="decode steps per round")
    ask.add_argument(
        "--harness", default=str(ROOT / "assets" / "reference"), help="model folder of the harness's share"
    )
    ask.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speed-cpu.json")
    args = ask.parse_args()
    results = []
    machine = hardware() | {"load_before": round(os.getloadavg()[0], 2)}
    for threads in map(int, args.threads.split(",")):
        for name in args.models.split(","):
            result = measure(name, args.length, args.rounds, args.steps, threads)
            show(result)
            results.append(result)
    torch.set_num_threads(1)
    share = harness(args.harness, limit=4)
    outside = share["outside_the_model"]
    print(f"\nharness outside the model: {outside:.1%}, {share['samples']} samples  goal < 5%", end="  ")
    print("met" if outside < 0.05 else "MISSED")
    record = {
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
        "harness": share,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
