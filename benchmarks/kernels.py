"""What the ops cost on a CPU: whole decode steps and single ops, each against what it is held to, in one run.

    python benchmarks/kernels.py                   # tables, and benchmarks/results/kernels-cpu.json
    python benchmarks/kernels.py --length 2048 --threads 1 --rounds 2 --out /dev/null

Decode steps are those of a random Llama of 100M parameters. The prompt is read once for all variants, then all of them
decode in turns, token by token; a ratio is formed inside a round, so that what else the machine does hits both sides.
Printed: median of the rounds' ratios, lowest and highest. "in PyTorch" is the same cache under
kernels.backend=reference.

The other side of a comparison is the real thing where it can be: QuantizedCache of transformers with its fp8 back end,
and with optimum-quanto where that can be imported. A masked AdaKV (all slots are kept and attended to, the dropped ones
hidden by a mask) is written here, with what our AdaKV has kept; `full` is what any such mask costs at least.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# run as a file, only its own folder would be on the path, where transformers would take this file for `kernels`
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface, DynamicCache, QuantizedCache  # noqa: E402

from benchmarks.kernel_ops import codes, prompt, ragged, show_op, spread, verdict  # noqa: E402
from benchmarks.speed import MODELS, Sequence, commit, hardware  # noqa: E402
from kernels import backend, compiled  # noqa: E402
from methods import load_method  # noqa: E402
from methods.core.group import Shared  # noqa: E402
from methods.core.meter import nbytes  # noqa: E402

PLAIN = "transformers"
FP8, QUANTO = "transformers, fp8", "transformers, quanto 4"
MASKED = "adakv 0.25, masked"
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "kivi 8": {"bits": 8},
    "kivi 4": {"bits": 4},
    "kivi 2": {"bits": 2},
    "per_token 4": {"bits": 4},
    "snapkv 0.25": {"budget": 0.25},
    "adakv 0.25": {"budget": 0.25},
    "h2o 0.25": {"budget": 0.25},
    "snapkv 40": {"budget": 40},  # slots: nearly nothing to attend to, what no cache can undercut
}
#: caches that also decode without the C++ forms
ALSO_IN_PYTORCH = ("kivi 4", "per_token 4", "adakv 0.25")
#: (what, variant, against, the highest ratio of decode steps that meets the goal)
GOALS = [
    ("kivi 4 against QuantizedCache, quanto", "kivi 4", QUANTO, 1 / 3),
    ("kivi 4 against QuantizedCache, fp8", "kivi 4", FP8, 1 / 3),
    ("kivi 4 against the full cache", "kivi 4", "full", 2.5),
    ("kivi 4 in PyTorch against the full cache", "kivi 4, in PyTorch", "full", 2.5),
    ("ragged against rectangular, same slots", "adakv 0.25", "snapkv 0.25", 1.15),
    ("ragged in PyTorch against rectangular", "adakv 0.25, in PyTorch", "snapkv 0.25", 1.15),
    ("ragged against masked", "adakv 0.25", MASKED, 1.0),
    ("ragged against full", "adakv 0.25", "full", 1.0),
    ("h2o against plain decode, same slots", "h2o 0.25", "snapkv 0.25", 1.15),
]


class InPyTorch(Sequence):
    """A sequence whose ops take their plain forms."""

    def step(self) -> float:
        """Seconds of one decode step, taken by the plain forms."""
        backend.use("reference")
        try:
            return super().step()
        finally:
            backend.use("auto")


def masked_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention over all slots where `module.hidden_slots` [1, Hq, 1, n] tells which old ones are hidden."""
    seen = F.pad(~module.hidden_slots, (0, k.shape[2] - module.hidden_slots.shape[-1]), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("masked", masked_attention)


def masked(plain: Any, kept: Any) -> Any:
    """A copy of the model that hides from every head what an eviction method's cache has dropped."""
    model = copy.deepcopy(plain)
    model.set_attn_implementation("masked")
    for layer, kept_layer in zip(model.model.layers, kept.layers, strict=True):
        pos = kept_layer.inner.store.pos  # [1, H, S]
        hidden = torch.ones(*pos.shape[:2], int(pos.max()) + 2, dtype=torch.bool)
        hidden.scatter_(2, torch.where(pos < 0, hidden.shape[-1] - 1, pos).long(), False)
        groups = plain.config.num_attention_heads // pos.shape[1]
        layer.self_attn.hidden_slots = hidden[..., :-1].repeat_interleave(groups, dim=1)[:, :, None]
    return model


@torch.inference_mode()
def prompted(plain: Any, length: int, clock: Callable[[], float]) -> dict[str, Sequence]:
    """All variants after the same prompt, which is read once."""
    ours = copy.deepcopy(plain)
    ids = torch.randint(3, plain.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    caches = {name: load_method(name.split()[0], **knobs).cache_for(ours) for name, knobs in METHODS.items()}
    lead, followers = caches["full"], [caches[name] for name in METHODS if name != "full"]
    for i, layer in enumerate(lead.layers):
        layer.inner = Shared(layer.inner, [cache.layers[i].inner for cache in followers])
    first = Sequence(ours, lead, clock)
    print(f"\nread {length} tokens in {first.feed(ids):.1f} s", flush=True)
    for layer in lead.layers:
        layer.inner = layer.inner.leader
    for cache in followers:
        cache.resume_from(lead)

    dense = [tuple(x.clone() for x in layer.inner.store.read()) for layer in lead.layers]
    running = {name: Sequence(ours, cache, clock) for name, cache in caches.items()}
    for name in ALSO_IN_PYTORCH:
        running[f"{name}, in PyTorch"] = InPyTorch(ours, caches[name].fork(), clock)
    theirs = {PLAIN: DynamicCache(config=plain.config), FP8: QuantizedCache("fp8", plain.config)}
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        theirs[QUANTO] = QuantizedCache("quanto", plain.config, nbits=4, axis_key=0, axis_value=0)
    theirs[MASKED] = DynamicCache(config=plain.config)
    for name, cache in theirs.items():
        for i, (k, v) in enumerate(dense):
            cache.update(k.clone(), v.clone(), i)
        running[name] = Sequence(masked(plain, caches["adakv 0.25"]) if name == MASKED else plain, cache, clock)
    for sequence in running.values():
        sequence.n, sequence.token = length, first.token
    return running


def decode(name: str, length: int, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds per decode step of every variant after the same prompt, and the bytes that ours hold."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    plain = MODELS[name]()
    length = min(length, plain.config.max_position_embeddings - (rounds + 1) * steps)
    running = prompted(plain, length, clock)
    held = {
        variant: nbytes(t for one in running[variant].cache.layers for t in one.inner.tensors()) for variant in METHODS
    }
    times: dict[str, list[float]] = {variant: [] for variant in running}
    order = list(running)
    for round_ in range(-1, rounds):
        random.Random(round_).shuffle(order)
        each: dict[str, list[float]] = {variant: [] for variant in order}
        for _ in range(steps):
            for variant in order:
                each[variant].append(running[variant].step())
        for variant in order:
            if round_ >= 0:  # the first one warms up
                times[variant].append(statistics.median(each[variant]))
    return {
        "model": name,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall",
        "kernels": compiled.name_on(torch.device("cpu")),
        "tokens": length,
        "decode_steps": steps,
        "rounds": rounds,
        "seconds": times,
        "bytes_held": held,
        "against_full": {variant: spread(times[variant], times["full"]) for variant in running},
        "goals": [verdict(what, limit, spread(times[a], times[b])) for what, a, b, limit in GOALS if b in times],
    }


def show_steps(result: dict[str, Any]) -> None:
    """Print the decode steps of every variant."""
    print(f"\n{result['model']}, {result['tokens']} tokens, {result['threads']} thread(s), {result['rounds']} rounds")
    for variant, ratio in result["against_full"].items():
        ms = statistics.median(result["seconds"][variant]) * 1e3
        share = result["bytes_held"].get(variant, 0) / result["bytes_held"]["full"]
        print(
            f"  {variant:24} {ms:8.2f} ms/token   {ratio['median']:6.3f} of full "
            f"({ratio['low']:.3f} to {ratio['high']:.3f})" + (f"   bytes {share:.1%}" if share else "")
        )


def show_goals(goals: list[dict[str, Any]]) -> None:
    """Print goals, and whether they are met."""
    for row in goals:
        met = "met" if row["met"] else "MISSED"
        print(
            f"  goal: {row['what']} <= {row['goal']:.2f}: {row['median']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f}), {met}"
        )


def main() -> None:
    """Time the ops and the decode steps; prints tables and writes the JSON."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default="llama-100m", choices=list(MODELS))
    ask.add_argument("--threads", default="2,1", help="thread counts, in the order of their turns")
    ask.add_argument("--length", type=int, default=8000, help="prompt tokens of the decode steps")
    ask.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt whose column sums are taken")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--steps", type=int, default=16, help="decode steps per round")
    ask.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels-cpu.json")
    args = ask.parse_args()
    machine, code = hardware() | {"load_before": round(os.getloadavg()[0], 2)}, commit()
    results, ops = [], []
    for threads in map(int, args.threads.split(",")):
        n = args.length // 64 * 64
        measured = [codes(n, args.rounds, threads), ragged(n // 4, args.rounds, threads)]
        measured += prompt(args.prompt, args.rounds, threads).values()
        for op in measured:
            show_op(op)
            show_goals(op.get("goals", []))
        ops += measured
        results.append(decode(args.model, args.length, args.rounds, args.steps, threads))
        show_steps(results[-1])
        show_goals(results[-1]["goals"])
    record = {
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "commit": code,
        "hardware": machine | {"load_after": round(os.getloadavg()[0], 2)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({"optimum-quanto": _quanto()} if importlib.util.find_spec("optimum") else {}),
        },
        "ops": ops,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.out}")


def _quanto() -> str:
    from importlib.metadata import version

    return version("optimum-quanto")


if __name__ == "__main__":
    main()
