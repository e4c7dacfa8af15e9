"""What 16-bit caches cost on a CPU: decode steps of the same method over float16 and over float32 slots, in turns.

    python benchmarks/cache_dtype.py                    # a table, and benchmarks/results/cache-dtype-cpu.json
    python benchmarks/cache_dtype.py --length 1024 --rounds 2 --out /dev/null

Each prompt is read once per type, for all methods. A ratio is formed inside a round of steps, so that what else the
machine does hits both sides. Printed: median of the rounds' ratios, lowest and highest, and the bytes held of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# run as a file, only its own folder would be on the path, where transformers would take kernels.py for `kernels`
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

import torch  # noqa: E402

from benchmarks.kernel_ops import spread  # noqa: E402
from benchmarks.speed import MODELS, Sequence, commit, hardware  # noqa: E402
from kernels import compiled  # noqa: E402
from methods import load_method  # noqa: E402
from methods.core.group import Shared  # noqa: E402
from methods.core.meter import nbytes  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv": {"budget": 0.25},
    "adakv": {"budget": 0.25},
    "h2o": {"budget": 0.25},
    "keyformer": {"budget": 0.25},
    "kivi": {"bits": 4},
}


@torch.inference_mode()
def prompted(
    model: Any, ids: torch.Tensor, dtype: str, clock: Callable[[], float]
) -> tuple[float, dict[str, Sequence]]:
    """Seconds of the prompt's pass with all methods beside each other, and every method behind it."""
    caches = {name: load_method(name, cache_dtype=dtype, **knobs).cache_for(model) for name, knobs in METHODS.items()}
    lead, followers = caches["full"], [cache for name, cache in caches.items() if name != "full"]
    for i, layer in enumerate(lead.layers):
        layer.inner = Shared(layer.inner, [cache.layers[i].inner for cache in followers])
    first = Sequence(model, lead, clock)
    seconds = first.feed(ids)
    for layer in lead.layers:
        layer.inner = layer.inner.leader
    running = {}
    for name, cache in caches.items():
        if cache is not lead:
            cache.resume_from(lead)
        running[name] = Sequence(model, cache, clock)
        running[name].n, running[name].token = ids.shape[1], first.token
    return seconds, running


def measure(name: str, length: int, rounds: int, steps: int, threads: int, dtype: str) -> dict[str, Any]:
    """Seconds per decode step of every method over slots of both types, and what it holds."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    model = MODELS[name]()
    length = min(length, model.config.max_position_embeddings - (rounds + 1) * steps)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    sides = {one: prompted(model, ids, one, clock) for one in ("float32", dtype)}
    held = {
        side: {
            method: nbytes(t for x in one.cache.layers for t in x.inner.tensors()) for method, one in running.items()
        }
        for side, (_, running) in sides.items()
    }
    times: dict[str, dict[str, list[float]]] = {side: {method: [] for method in METHODS} for side in sides}
    for round_ in range(-1, rounds):
        for method in METHODS:
            each: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(steps):
                for side, (_, running) in sides.items():
                    each[side].append(running[method].step())
            for side in sides if round_ >= 0 else ():  # the first one warms up
                times[side][method].append(statistics.median(each[side]))
    return {
        "model": name,
        "tokens": length,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall",
        "kernels": compiled.name_on(torch.device("cpu")),
        "dtype": dtype,
        "rounds": rounds,
        "decode_steps": steps,
        "prefill_seconds": {side: seconds for side, (seconds, _) in sides.items()},
        "seconds": times,
        "bytes_held": held,
        "against_float32": {method: spread(times[dtype][method], times["float32"][method]) for method in METHODS},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-100m")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cache-dtype-cpu.json")
    given = parser.parse_args()
    found = measure(given.model, given.length, given.rounds, given.steps, given.threads, given.dtype)
    before = found["prefill_seconds"]
    print(f"{found['model']}, {found['tokens']} tokens, {found['threads']} thread(s), {found['rounds']} rounds")
    print(f"  prompt, all methods together: {before[given.dtype] / before['float32']:.3f} of float32's")
    for method, ratio in found["against_float32"].items():
        ms = statistics.median(found["seconds"][given.dtype][method]) * 1e3
        share = found["bytes_held"][given.dtype][method] / found["bytes_held"]["float32"][method]
        print(f"  {method:10} {ms:8.2f} ms/token   {ratio['median']:.3f} of float32's "
              f"({ratio['low']:.3f} to {ratio['high']:.3f})   bytes {share:.1%}")  # fmt: skip
    given.out.write_text(
        json.dumps({"commit": commit(), **hardware(), "decode": found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
