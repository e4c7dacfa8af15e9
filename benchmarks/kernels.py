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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, QuantizedCache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed import MODELS, Sequence, commit, hardware  # noqa: E402
from kernels import Rules, attend, backend, compiled, mass  # noqa: E402
from kernels.attend import attend_pages  # noqa: E402
from kernels.attend_quantized import attend_quantized  # noqa: E402
from kernels.quantize import dequantize, quantize  # noqa: E402
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
MASS_GOAL = 1.2


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


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios of two lists of seconds, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    summary = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {key: round(value, 4) for key, value in summary.items()}


def verdict(what: str, limit: float, ratio: dict[str, float]) -> dict[str, Any]:
    """A goal, the ratios measured for it, and whether it is met."""
    return {"what": what, "goal": round(limit, 4), **ratio, "met": ratio["median"] <= limit}


def plain_form(run: Callable[[], Any]) -> None:
    """Call it with the ops' plain forms."""
    backend.use("reference")
    run()
    backend.use("auto")


def in_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, times: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one that warms up; medians of so many calls."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(-1, rounds):
        for way, run in ways.items():
            each = []
            for _ in range(times if round_ >= 0 else 1):
                start = clock()
                run()
                each.append(clock() - start)
            if round_ >= 0:
                seconds[way].append(statistics.median(each))
    return seconds


@torch.inference_mode()
def codes(length: int, rounds: int, threads: int) -> dict[str, Any]:
    """One layer's attention of one token, 12 query heads on 4 of width 64, over codes and over what they stand for."""
    q, k, v = _random(length)
    at: dict[str, Any] = {"q_pos": torch.tensor([[length]]), "k_pos": torch.arange(length).view(1, 1, -1)}
    rules, none = Rules(64**-0.5), k[:, :, :0]
    ways: dict[str, Callable[[], Any]] = {"full precision": partial(attend, q, k, v, rules, **at, layout="all")}
    for bits in (8, 4, 3, 2):
        for name, dim in ((f"{bits} bits", 2), (f"{bits} bits, keys per token", 3)):
            keys, values = quantize(k, bits, 32, dim), quantize(v, bits, 32, 3)
            run = partial(attend_quantized, q, (keys, none), (values, none), rules, **at, layout="all")
            ways[name], ways[f"{name}, in PyTorch"] = run, partial(plain_form, run)
            if dim == 2:
                ways[f"{name}, unpacked first"] = partial(_unpacked_first, q, keys, values, rules, at)
    seconds = in_turns(ways, rounds, 5, threads)
    return _op(f"attention of one token over {length} slots", "full precision", seconds, threads)


def _unpacked_first(q: Tensor, keys: Any, values: Any, rules: Rules, at: dict[str, Any]) -> Tensor:
    return attend(q, dequantize(keys), dequantize(values), rules, **at, layout="all")


@torch.inference_mode()
def ragged(length: int, rounds: int, threads: int) -> dict[str, Any]:
    """The same over pages of heads that hold different numbers of slots, and over a rectangle of as many."""
    q, k, v = _random(length)
    shares = [1.6, 1.2, 0.8, 0.4]  # of the heads, in pages of 16
    counts = [int(length * share) // 16 for share in shares]
    P = sum(counts)
    stored = k.reshape(-1, 16, 64)[:P], v.reshape(-1, 16, 64)[:P]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    pos = torch.cat([torch.arange(n * 16) for n in counts]).int().view(P, 16)
    tail = k[:, :, :0], v[:, :, :0], torch.empty(1, 4, 0, dtype=torch.int32)
    at, rules = {"q_pos": torch.tensor([[4 * length]], dtype=torch.int32)}, Rules(64**-0.5)
    n = P * 16 // 4
    run = partial(attend_pages, q, (*stored, pos, owner), tail, rules, **at)
    rectangle = k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
    ways = {
        "rectangle": partial(attend, q, *rectangle, rules, **at, k_pos=torch.arange(n).view(1, 1, -1), layout="all"),
        "pages": run,
        "pages, in PyTorch": partial(plain_form, run),
    }
    return _op(
        f"attention of one token over {n} slots a head", "rectangle", in_turns(ways, rounds, 20, threads), threads
    )


@torch.inference_mode()
def prompt(length: int, rounds: int, threads: int) -> dict[str, Any]:
    """Column sums of a prompt's attention against its SDPA."""
    g = torch.Generator().manual_seed(0)
    ways: dict[str, Callable[[], Any]] = {}
    at: dict[str, Any] = {"q_pos": torch.arange(length)[None], "k_pos": torch.arange(length)[None, None]}
    result: dict[str, Any] = {}
    for heads, kv_heads in ((12, 4), (8, 8)):
        q, k, v = (torch.randn(1, h, length, 64, generator=g) for h in (heads, kv_heads, kv_heads))
        ways = {
            "SDPA": partial(attend, q, k, v, Rules(0.125), **at, layout="causal"),
            "mass": partial(mass, q, k, Rules(0.125), **at, layout="tail"),
        }
        seconds = in_turns(ways, rounds, 1, threads)
        name = f"mass of all {length} queries, {heads} heads on {kv_heads}"
        result[name] = _op(name, "SDPA", seconds, threads)
        result[name]["goals"] = [verdict(f"{name}, against SDPA", MASS_GOAL, spread(seconds["mass"], seconds["SDPA"]))]
    return result


def _random(length: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 64, generator=g) for heads, n in ((12, 1), (4, length), (4, length)))
    return q, k, v


def _op(what: str, against: str, seconds: dict[str, list[float]], threads: int) -> dict[str, Any]:
    rows = {
        way: {"ms": round(statistics.median(times) * 1e3, 3), **spread(times, seconds[against])}
        for way, times in seconds.items()
    }
    return {"what": what, "threads": threads, "against": against, "ways": rows}


def show_op(op: dict[str, Any]) -> None:
    """Print the ways of one op and their ratios."""
    print(f"\n{op['what']}, {op['threads']} thread(s)")
    for way, row in op["ways"].items():
        print(f"  {way:34} {row['ms']:9.3f} ms   {row['median']:6.3f} of {op['against']}", flush=True)


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
