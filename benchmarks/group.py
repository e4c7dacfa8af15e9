"""A sweep against its single runs, in one go: what reading each prompt once saves.

    python benchmarks/group.py

runs 24 cells on the bundled longbench-mini as a sweep, several times, and as 24 commands between these sweeps, each
command loading the model by itself (with --singles fewer of them, which the others are taken to be like); then the same
four methods as sweeps of one budget each. It writes results/group-cpu.json (group-cuda.json on a GPU): seconds with
everything and without start-up and model loading, their ratios, how many predictions differ, and seconds by budget.
Goals: 1/8 with model loading, 1/5 without; no budget slower than a larger one. Next to seconds on the clock stand those
that the processor has worked: on a CPU that others use too, only these mean anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("random", "streaming_llm", "snapkv", "nacl")
BUDGETS = (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)
GOALS = {"with_loading": 1 / 8, "without": 1 / 5}
ROUNDS, NEW_TOKENS = 3, 16  # of the sweeps by budget: every answer of one length, whatever a budget makes of it


@dataclasses.dataclass
class Seconds:
    """clock: from start to end.  processor: what all threads have worked."""

    clock: float
    processor: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock + other.clock, self.processor + other.processor)

    def times(self, n: float) -> Seconds:
        """n times as many."""
        return Seconds(self.clock * n, self.processor * n)

    def over(self, other: Seconds) -> dict[str, float]:
        """Ratios to another's."""
        return {"clock": self.clock / other.clock, "processor": self.processor / other.processor}


def main() -> int:
    """Time one sweep as a group and as single runs, and write both; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=4, help="samples per subset; there are six subsets")
    parser.add_argument("--sweeps", type=int, default=3, help="how often the sweep is run")
    parser.add_argument("--singles", type=int, default=24, help="single runs; fewer than 24 are scaled up")
    parser.add_argument("--out", default=None)
    parser.add_argument("overrides", nargs="*", help="for run.py, such as model.path=DIR")
    args = parser.parse_args()
    cells = [(method, budget) for method in METHODS for budget in BUDGETS]
    # evenly over the methods, and over the budgets
    chosen = [cells[i * len(cells) // args.singles + i % len(BUDGETS) % (len(cells) // args.singles)]
              for i in range(args.singles)]  # fmt: skip
    base = ["model=reference", f"task.limit={args.limit}", *args.overrides]
    grid = ["-m", f"method={','.join(METHODS)}", f"budget={','.join(map(str, BUDGETS))}"]
    print(f"{len(cells)} cells and the full cache, {args.limit} samples per subset")
    with tempfile.TemporaryDirectory() as folder:
        sweeps: list[Seconds] = []
        singles: list[Seconds] = []
        loads: list[Seconds] = []

        def sweep() -> None:
            results = f"{folder}/sweep{len(sweeps)}"
            sweeps.append(command([*grid, *base, f"results={results}"]))
            print(f"sweep: {sweeps[-1]}", flush=True)

        for i, (method, budget) in enumerate(chosen):
            if i * args.sweeps // len(chosen) == len(sweeps):
                sweep()
            before = sample_seconds(f"{folder}/single")
            singles.append(command([f"method={method}", f"budget={budget}", *base, f"results={folder}/single"]))
            # what its own clock gives to samples is not start-up
            working = (sample_seconds(f"{folder}/single") - before) / singles[-1].clock
            loads.append(singles[-1].times(1 - working))
            print(f"{method} {budget}: {singles[-1]}, of which loading {loads[-1]}", flush=True)
        differ, total = differences(Path(folder, "sweep0"), Path(folder, "single"))
    whole = Seconds(median(one.clock for one in sweeps), median(one.processor for one in sweeps))
    load = Seconds(median(one.clock for one in loads), median(one.processor for one in loads))
    alone = sum(singles, Seconds(0, 0)).times(len(cells) / len(chosen))
    rest = alone + load.times(-len(cells))
    ratios = {"with_loading": whole.over(alone), "without": (whole + load.times(-1)).over(rest)}
    report = {
        "cells": len(cells),
        "samples": 6 * args.limit,
        "single_runs_measured": len(chosen),
        "seconds": {
            "sweeps": [vars(one) for one in sweeps],
            "single_runs": {f"{method} {budget}": vars(one) for (method, budget), one in zip(chosen, singles)},
            "all_single_runs": vars(alone),
            "loading": vars(load),
        },
        "ratios": ratios,
        "goals": GOALS,
        "sweep_by_budget": by_budget(args.overrides),
        "predictions": {"compared": total, "different": differ},
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(),
                    "load": round(os.getloadavg()[2], 1), "threads": os.environ.get("OMP_NUM_THREADS")},
    }  # fmt: skip
    out = Path(args.out or ROOT / "benchmarks" / "results" / f"group-{device()}.json")
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, ratio in ratios.items():
        fractions = ", ".join(f"1/{1 / value:.1f} by {clock}" for clock, value in ratio.items())
        print(f"{name}: {fractions} of the single runs, goal 1/{1 / GOALS[name]:.0f}")
    print(f"{differ} of {total} predictions differ; {out}")
    return 0


def command(words: list[str]) -> Seconds:
    """What one command takes, start to end."""

    def worked() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, began = worked(), time.perf_counter()
    subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, check=True, capture_output=True)
    return Seconds(time.perf_counter() - began, worked() - before)


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a record's samples.jsonl."""
    sys.path.insert(0, str(ROOT))
    from analysis.records import FINISHED, read_samples

    return read_samples(path, FINISHED)


def sample_seconds(results: str) -> float:
    """Seconds on the clock that the records give to their samples."""
    rows = (row for path in Path(results).rglob("samples.jsonl") for row in samples(path))
    return sum(row["timings"][part] for row in rows for part in ("prompt", "question", "decode"))


def by_budget(overrides: Sequence[str]) -> dict[str, Any]:
    """The methods at one budget in one group, for each budget in turns: medians over the rounds, sums over prompts."""
    sys.path.insert(0, str(ROOT))
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from methods import load_method
    from runners.cells import Run
    from runners.engine.generation import together
    from runners.settings.parts import task_of

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["method=full", "task.limit=1", *overrides]
        cfg = compose("config", overrides=words, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        run = Run(cfg, task_of(cfg), Path("nowhere"), "full")
    prompts = [
        dataclasses.replace(run.encoder(example).prompt, max_new_tokens=NEW_TOKENS, ends=()) for example in run.examples
    ]
    by_budget: dict[float, list[Seconds]] = {budget: [] for budget in BUDGETS}
    for turn in range(ROUNDS + 1):
        for budget in BUDGETS if turn % 2 else reversed(BUDGETS):
            methods = [load_method("full"), *(load_method(name, budget=budget) for name in METHODS)]
            spent = [clock(partial(together, run.model, methods, [prompt])) for prompt in prompts]
            if turn:  # the first round warms up
                by_budget[budget].append(sum(spent, Seconds(0, 0)))
    print("by budget:", {b: round(median(one.processor for one in times), 2) for b, times in by_budget.items()})
    threads = torch.get_num_threads()
    return {
        "prompts": len(prompts), "new_tokens": NEW_TOKENS, "methods": ["full", *METHODS], "threads": threads,
        "tokens": round(fmean(len(prompt.ids) for prompt in prompts)),
        "seconds": {str(budget): [vars(one) for one in times] for budget, times in by_budget.items()},
    }  # fmt: skip


def clock(act: Callable[[], Any]) -> Seconds:
    """The seconds that a call takes."""
    began, worked = time.perf_counter(), time.process_time()
    act()
    return Seconds(time.perf_counter() - began, time.process_time() - worked)


def differences(a: Path, b: Path) -> tuple[int, int]:
    """Samples whose predictions differ between two folders of records, and how many both have."""
    differ = []
    for path in sorted(a.rglob("samples.jsonl")):
        other = b / path.relative_to(a)
        if not other.exists():  # not every cell need have run by itself
            continue
        ours, theirs = ({row["id"]: row["prediction"] for row in samples(p)} for p in (path, other))
        differ += [ours[id] != theirs[id] for id in ours]
    return sum(differ), len(differ)


def device() -> str:
    """Where the models run: cuda or cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
