"""What scoring a prompt costs: time beside plain attention, and peak memory against length, on a CPU.

    python benchmarks/prompt_overhead.py                    # a table, and benchmarks/results/prompt-overhead-cpu.json
    python benchmarks/prompt_overhead.py --rounds 2 --out /dev/null

One attention layer takes in a random prompt. `full` is plain attention; a method's overhead is the time it takes beyond
that, in units of it. `eager` is what a release does that needs the probabilities themselves: the whole n x n matrix,
multiplied with the values and summed over its rows. Rounds run all variants in turn, a ratio is formed inside its
round, and the time is the processor's, on one thread. Memory is the highest resident set of a fresh process beyond what
it held before the layer's turn, keys and values included.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import Rules  # noqa: E402
from methods import load_method  # noqa: E402
from methods.core.contract import Stage, Step  # noqa: E402

VARIANTS = ["full", "h2o", "keyformer", "scissorhands", "tova", "snapkv", "nacl"]
GOALS = {"h2o": 2.0, "keyformer": 2.0}  # overhead in units of plain attention
LENGTHS = [2048, 4096, 8192]
# growth from the second to the third length over growth from the first to the second: 2 is linear, 4 is quadratic
LINEAR = 2.5


class OneLayer:
    """What `Method.caches` needs to know of a model of one layer."""

    n_layers = 1


def prompt(n: int, heads: int, kv_heads: int, dim: int) -> Step:
    """The step of a prompt of n tokens: random q [1, heads, n, dim], k and v [1, kv_heads, n, dim]."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, dim, generator=g) for h in (heads, kv_heads, kv_heads))
    pos = torch.arange(n, dtype=torch.int32)[None]
    samples = torch.zeros(1, dtype=torch.long)
    return Step(0, 1, Stage.ENDS_PROMPT, q, k, v, pos, samples.int(), False, samples, Rules(dim**-0.5))


@torch.inference_mode()
def layer_turn(variant: str, step: Step, budget: float) -> Any:
    """The layer's whole turn: append, attend, compress; returns what holds the result."""
    if variant == "eager":
        return eager(step)
    method = load_method("full") if variant == "full" else load_method(variant, budget=budget)
    layer = method.caches(OneLayer(), None)[0]  # type: ignore[arg-type]
    layer.append(step)
    out = layer.attend(step)
    layer.end_step(step)
    return out, layer


def eager(step: Step) -> Any:
    """Attention with its probabilities in full, and their column sums."""
    G = step.q.shape[1] // step.k.shape[1]
    k, v = (x.repeat_interleave(G, dim=1) for x in (step.k, step.v))
    n = step.q.shape[2]
    x = step.q @ k.mT * step.rules.scale
    p = x.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return p @ v, p.sum(2)


def times(length: int, heads: int, kv_heads: int, dim: int, rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of every variant in every round."""
    step = prompt(length, heads, kv_heads, dim)
    variants = [*VARIANTS, "eager"]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant in variants:  # warm up
        layer_turn(variant, prompt(256, heads, kv_heads, dim), budget)
    for round_ in range(rounds):
        for variant in variants[round_ % len(variants) :] + variants[: round_ % len(variants)]:
            start = time.process_time()
            layer_turn(variant, step, budget)
            seconds[variant].append(time.process_time() - start)
    return seconds


def peak(variant: str, length: int, heads: int, kv_heads: int, dim: int, budget: float) -> int:
    """Bytes that a fresh process needs at most for the layer's turn."""
    args = [variant, length, heads, kv_heads, dim, budget]
    # freed tensors go back to the system at once, so that the peak is what was held together
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, args)], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def child(variant: str, length: str, heads: str, kv_heads: str, dim: str, budget: str) -> None:
    """Print the peak of one turn: the highest resident set is set back just before it."""
    torch.set_num_threads(1)
    shape = int(heads), int(kv_heads), int(dim)
    layer_turn(variant, prompt(256, *shape), float(budget))
    step = prompt(int(length), *shape)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    result = layer_turn(variant, step, float(budget))
    print(_status("VmHWM") - before)
    del result


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key + ":")))


def main() -> None:
    """Time every method's prefill against plain attention; prints a table and writes the JSON."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--length", type=int, default=4096, help="prompt tokens of the timing")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--heads", type=int, default=8)
    ask.add_argument("--kv-heads", type=int, default=8)
    ask.add_argument("--dim", type=int, default=64)
    ask.add_argument("--budget", type=float, default=0.5)
    ask.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prompt-overhead-cpu.json")
    args = ask.parse_args()
    torch.set_num_threads(1)
    shape = args.heads, args.kv_heads, args.dim

    print(f"one layer, {args.heads} heads on {args.kv_heads} KV heads of {args.dim}, {args.length} tokens, 1 thread")
    seconds = times(args.length, *shape, args.rounds, args.budget)
    rows = {}
    for variant, variant_times in seconds.items():
        over = [(a - b) / b for a, b in zip(variant_times, seconds["full"], strict=True)]
        goal = GOALS.get(variant)
        rows[variant] = {
            "seconds": variant_times,
            "overhead": statistics.median(over),
            "low": min(over),
            "high": max(over),
            "goal": goal,
            "met": None if goal is None else statistics.median(over) <= goal,
        }
        verdict = "" if goal is None else f"  goal <= {goal:g} {'met' if rows[variant]['met'] else 'MISSED'}"
        print(
            f"  {variant:13} {statistics.median(variant_times):7.3f} s  overhead {rows[variant]['overhead']:6.2f}"
            f"  ({min(over):.2f} to {max(over):.2f}){verdict}"
        )

    print(f"peak memory beyond the prompt's own q, k and v, MiB, at {', '.join(map(str, LENGTHS))} tokens")
    memory = {}
    for variant in ["full", *GOALS, "eager"]:
        sizes = [peak(variant, n, *shape, args.budget) for n in LENGTHS]
        growth = (sizes[2] - sizes[1]) / max(1, sizes[1] - sizes[0])
        memory[variant] = {"lengths": LENGTHS, "bytes": sizes, "growth": growth, "linear": growth <= LINEAR}
        shown = "  ".join(f"{size / 2**20:8.1f}" for size in sizes)
        print(f"  {variant:13} {shown}  growth {growth:.2f}  {'linear' if growth <= LINEAR else 'not linear'}")

    record = {
        "command": " ".join(["python", "benchmarks/prompt_overhead.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": {"heads": args.heads, "kv_heads": args.kv_heads, "dim": args.dim, "tokens": args.length},
        "budget": args.budget,
        "load_before": round(os.getloadavg()[0], 2),
        "time": rows,
        "memory": memory,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
