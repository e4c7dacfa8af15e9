"""Single ops of attention on a CPU, each in turns with what it is held to: a part of benchmarks/kernels.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import Rules, attend, backend, mass
from kernels.attend import Pages, attend_pages
from kernels.attend_quantized import attend_quantized
from kernels.quantize import dequantize, quantize

MASS_GOAL = 1.2


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
    shares = [1.6, 1.2, 0.8, 0.4]  # of the heads
    held = torch.tensor([int(length * share) for share in shares])
    n = int(held.sum()) // 4
    pos = torch.cat([torch.arange(m) for m in held.tolist()]).int()
    flat = k.reshape(-1, 64)[: len(pos)], v.reshape(-1, 64)[: len(pos)], pos
    at = torch.arange(len(pos), dtype=torch.int32)
    tail = k[:, :, :0], v[:, :, :0], torch.empty(1, 4, 0, dtype=torch.int32)
    now, rules = {"q_pos": torch.tensor([[4 * length]], dtype=torch.int32)}, Rules(64**-0.5)
    pages = Pages(*flat, at, held.cumsum(0) - held, held, int(held.max()))
    run = partial(attend_pages, q, pages, tail, rules, **now)
    rectangle = k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
    ways = {
        "rectangle": partial(attend, q, *rectangle, rules, **now, k_pos=torch.arange(n).view(1, 1, -1), layout="all"),
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
