"""A sweep against its single runs, in one go: what reading each prompt once saves.

    python benchmarks/group.py

runs 24 cells on the bundled longbench-mini once as a sweep and once as 24 commands, each loading the model by itself,
and writes benchmarks/group-cpu.json (group-cuda.json on a GPU): both times with everything and without start-up and
model loading, their ratios, and how many predictions differ. Goals: 1/8 with model loading, 1/5 without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("random", "streaming_llm", "snapkv", "nacl")
BUDGETS = (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)
GOALS = {"with_loading": 1 / 8, "without": 1 / 5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=4, help="samples per subset; there are six subsets")
    parser.add_argument("--out", default=None)
    parser.add_argument("overrides", nargs="*", help="for run.py, such as model.path=DIR")
    args = parser.parse_args()
    cells = [(method, budget) for method in METHODS for budget in BUDGETS]
    with tempfile.TemporaryDirectory() as folder:
        base = [f"task.limit={args.limit}", *args.overrides]
        both = [f"method={','.join(METHODS)}", f"budget={','.join(map(str, BUDGETS))}"]
        print(f"{len(cells)} cells and the full cache, {args.limit} samples per subset")
        seconds: dict[str, Any] = {}
        seconds["sweep"] = clock(["-m", *both, *base, f"results={folder}/sweep"])
        seconds["sweep, nothing left to do"] = clock(["-m", *both, *base, f"results={folder}/sweep"])
        singles, idle = [], []
        for method, budget in cells:
            words = [f"method={method}", f"budget={budget}", *base, f"results={folder}/single"]
            singles.append(clock(words))
            print(f"{method} {budget}: {singles[-1]:.1f} s", flush=True)
        seconds["singles"], seconds["single runs"] = sum(singles), dict(zip(map(str, cells), singles))
        for method in METHODS:  # a run that only loads: its answer is one token of one sample
            words = [f"method={method}", "budget=0.5", "task.limit=1", "task.subset=[kinds]", *args.overrides]
            idle.append(load_only(words, f"{folder}/idle"))
        seconds["loading"] = sum(idle) / len(idle)
        differ, total = differences(Path(folder, "sweep"), Path(folder, "single"))
    with_loading = seconds["sweep"] / seconds["singles"]
    without = (seconds["sweep"] - seconds["loading"]) / (seconds["singles"] - len(cells) * seconds["loading"])
    by_budget = {str(b): sum(s for (_, x), s in zip(cells, singles) if x == b) for b in BUDGETS}
    report = {
        "cells": len(cells),
        "samples": 6 * args.limit,
        "seconds": seconds,
        "single_runs_by_budget": by_budget,
        "ratios": {"with_loading": with_loading, "without": without},
        "goals": GOALS,
        "predictions": {"compared": total, "different": differ},
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }
    out = Path(args.out or ROOT / "benchmarks" / f"group-{device()}.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    for name, ratio in report["ratios"].items():
        print(f"{name}: 1/{1 / ratio:.1f} of the single runs, goal 1/{1 / GOALS[name]:.0f}")
    print(f"{differ} of {total} predictions differ; {out}")
    return 0


def clock(words: list[str]) -> float:
    """Seconds of one command, start to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def load_only(words: list[str], results: str) -> float:
    """Seconds of a run's start-up: everything before its first sample, by the record's own times."""
    seconds = clock([*words, f"results={results}"])
    rows = [json.loads(line) for path in Path(results).rglob("samples.jsonl") for line in path.read_text().splitlines()]
    spent = sum(row["timings"][part] for row in rows for part in ("prompt", "question", "decode"))
    for path in Path(results).rglob("samples.jsonl"):
        path.unlink()
    return seconds - spent


def differences(a: Path, b: Path) -> tuple[int, int]:
    """Samples whose predictions differ between two folders of records, and how many both have."""
    found = []
    for path in sorted(a.rglob("samples.jsonl")):
        other = b / path.relative_to(a)
        ours, theirs = ({row["id"]: row["prediction"] for row in map(json.loads, p.read_text().splitlines())}
                        for p in (path, other))  # fmt: skip
        found += [ours[id] != theirs[id] for id in ours]
    return sum(found), len(found)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
