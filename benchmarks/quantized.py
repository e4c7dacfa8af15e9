"""Decode time and bytes of quantized caches against the full cache, in one run, on a CPU.

    python benchmarks/quantized.py                   # a table, and benchmarks/quantized-cpu.json
    python benchmarks/quantized.py --length 2048 --threads 1 --rounds 2 --out /dev/null

Every variant reads the prompt once; then all of them decode in turns, token by token. A ratio is formed inside a
round: what else the machine does hits both sides. Printed: median of the rounds' ratios, lowest and highest. The
QuantizedCache of transformers takes part where its back end, optimum-quanto, can be imported.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed import MODELS, Sequence, commit, hardware  # noqa: E402
from kernels import Rules, attend  # noqa: E402
from kernels.attend_quantized import attend_quantized  # noqa: E402
from kernels.quantize import Packed, dequantize, quantize  # noqa: E402
from methods import load_method  # noqa: E402

QUANTO = "transformers, quanto 4"
# (variant, against, the highest ratio of decode steps that meets the goal)
GOALS = [("kivi 4", "full", 2.5), ("kivi 4", QUANTO, 1 / 3)]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "kivi 8": {"bits": 8},
    "kivi 4": {"bits": 4},
    "kivi 2": {"bits": 2},
    "per_token 4": {"bits": 4},
}


def variants(plain: Any, ours: Any) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """The model of every variant and what makes its cache; the plain model is never bound."""
    found: dict[str, tuple[Any, Callable[[], Any]]] = {}
    for name, knobs in METHODS.items():
        found[name] = ours, partial(load_method(name.split()[0], **knobs).cache_for, ours)
    found["transformers"] = (plain, lambda: DynamicCache(config=plain.config))
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        found[QUANTO] = (plain, lambda: QuantizedCache("quanto", plain.config, nbits=4, axis_key=0, axis_value=0))
    return found


def decode(name: str, length: int, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds per decode step of every variant after the same prompt, and the bytes that ours hold."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    plain = MODELS[name]()
    length = min(length, plain.config.max_position_embeddings - rounds * steps)
    ids = torch.randint(3, plain.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    running, prefill = {}, {}
    for variant, (model, make) in variants(plain, copy.deepcopy(plain)).items():
        Sequence(model, make(), clock).feed(ids[:, :256])  # warm-up
        running[variant] = Sequence(model, make(), clock)
        prefill[variant] = running[variant].feed(ids)
        running[variant].step()
        print(f"  {variant:24} read {length} tokens in {prefill[variant]:.1f} s", flush=True)
    held = {v: s.cache.report() for v, s in running.items() if v in METHODS}
    times: dict[str, list[float]] = {variant: [] for variant in running}
    order = list(running)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        each: dict[str, list[float]] = {variant: [] for variant in order}
        for _ in range(steps):
            for variant in order:
                each[variant].append(running[variant].step())
        for variant in order:
            times[variant].append(statistics.median(each[variant]))
    return {
        "model": name,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall",
        "tokens": length,
        "decode_steps": steps,
        "rounds": rounds,
        "seconds": {variant: {"prefill": prefill[variant], "decode": times[variant]} for variant in running},
        "share_of_full_bytes": {variant: round(report.share, 4) for variant, report in held.items()},
        "against_full": {variant: spread(times[variant], times["full"]) for variant in running},
        "goals": [
            {"what": f"{a} against {b}", "goal": round(limit, 4), **spread(times[a], times[b])}
            for a, b, limit in GOALS
            if b in times
        ],
    }


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs)]
    found = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {key: round(value, 4) for key, value in found.items()}


def operation(length: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of one layer's attention of one token: full precision, over codes, and unpack first, then attend."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 64, generator=g) for heads, n in ((12, 1), (4, length), (4, length)))
    at: dict[str, Any] = {
        "q_pos": torch.tensor([[length]]),
        "k_pos": torch.arange(length).view(1, 1, -1),
        "plan": "all",
    }
    rules, none = Rules(64**-0.5), k[:, :, :0]

    def over_codes(keys: Packed, values: Packed) -> Tensor:
        return attend_quantized(q, (keys, none), (values, none), rules, **at)

    def unpacked_first(keys: Packed, values: Packed) -> Tensor:
        return attend(q, dequantize(keys), dequantize(values), rules, **at)

    ways: dict[str, Callable[[], Tensor]] = {"full precision": partial(attend, q, k, v, rules, **at)}
    for bits in (8, 4, 3, 2):
        codes = quantize(k, bits, 32, 2), quantize(v, bits, 32, 3)
        ways[f"{bits} bits"] = partial(over_codes, *codes)
        ways[f"{bits} bits, unpacked first"] = partial(unpacked_first, *codes)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, run in ways.items():
            start = clock()
            for _ in range(5):
                run()
            if round_:  # the first round warms up
                seconds[way].append((clock() - start) / 5)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    full = medians["full precision"]
    return {
        "tokens": length,
        "threads": threads,
        "kv_heads": 4,
        "query_heads": 12,
        "width": 64,
        "ways": {way: {"ms": round(s * 1e3, 3), "against_full": round(s / full, 3)} for way, s in medians.items()},
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}, {result['tokens']} tokens, {result['threads']} thread(s), {result['rounds']} rounds")
    for variant, ratio in result["against_full"].items():
        ms = statistics.median(result["seconds"][variant]["decode"]) * 1e3
        bytes_ = result["share_of_full_bytes"].get(variant)
        print(
            f"  {variant:24} {ms:8.2f} ms/token   {ratio['median']:6.3f} of full "
            f"({ratio['low']:.3f} to {ratio['high']:.3f})" + (f"   bytes {bytes_:.1%}" if bytes_ else "")
        )
    for row in result["goals"]:
        verdict = "met" if row["median"] <= row["goal"] else "MISSED"
        print(f"  goal: {row['what']} <= {row['goal']:.2f}: {row['median']:.3f}, {verdict}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default="llama-100m", choices=list(MODELS))
    ask.add_argument("--threads", default="2,1", help="thread counts, in the order of their turns")
    ask.add_argument("--length", type=int, default=8000, help="prompt tokens")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--steps", type=int, default=16, help="decode steps per round")
    ask.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quantized-cpu.json")
    args = ask.parse_args()
    machine = hardware() | {"load_before": round(os.getloadavg()[0], 2)}
    results, operations = [], []
    for threads in map(int, args.threads.split(",")):
        operations.append(operation(args.length // 32 * 32, args.rounds, threads))
        print(f"\none layer's attention over {operations[-1]['tokens']} tokens, {threads} thread(s)")
        for way, row in operations[-1]["ways"].items():
            print(f"  {way:24} {row['ms']:8.3f} ms   {row['against_full']:6.3f} of full precision")
        results.append(decode(args.model, args.length, args.rounds, args.steps, threads))
        show(results[-1])
    record = {
        "command": " ".join(["python", "benchmarks/quantized.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "attention": operations,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
