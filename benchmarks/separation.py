"""Whether the reference model tells methods apart: the sweep `experiment=separation`, and its paired intervals.

    python benchmarks/separation.py

writes benchmarks/separation.json: for every task, method and budget the score, the difference from the full cache on
the same samples with its 95 % interval, and the measured share of bytes; and which methods are apart at each budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="results", help="folder of the records")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "separation.json"))
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("overrides", nargs="*", help="for run.py, such as task.limit=5")
    args = parser.parse_args()
    began = time.perf_counter()
    command = [sys.executable, "run.py", "experiment=separation", f"results={args.results}", *args.overrides]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        return code
    found = [tables(cfg, args.results, args.resamples) for cfg in jobs(args.overrides)]
    report = {
        "command": "python benchmarks/separation.py",
        "seconds": round(time.perf_counter() - began),
        "tasks": found,
    }
    Path(args.out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for task in found:
        show(task)
    return 0


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each task's group, with its cells, as `-m` makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from runners.jobs import group

    params = OmegaConf.load(ROOT / "conf" / "experiment" / "separation.yaml").hydra.sweeper.params
    words = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    (cells,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    return group(cells)


def tables(job: list[str], results: str, resamples: int) -> dict[str, Any]:
    """Scores, differences, intervals and bytes of one task's cells, read from the records."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from runners.compare import compare
    from runners.sweep import Sweep

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*job, f"results={results}"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        sweep = Sweep(cfg, Path(results) if Path(results).is_absolute() else ROOT / results)
    run = sweep.run
    rows = {}
    for member in sweep.members:
        member.record.refresh()
        rows[member.cell.name, member.cell.method.budget] = run.finished(member.cell)
    full = rows["full", 1]
    cells = []
    for (name, budget), ours in rows.items():
        compared = compare(run.task, run.scored(ours, full), resamples, seed=0)
        whole = compared[-1]
        shares = [row["ledger"]["share"] for row in ours.values()]
        cells.append(
            {
                "method": name,
                "budget": budget,
                "n": len(ours),
                "score": whole.row.score,
                "difference": whole.difference,
                "interval": whole.interval,
                "share": round(sum(shares) / len(shares), 4),
                "subsets": {one.row.name: one.row.score for one in compared if one.row.kind == "subset"},
            }
        )
    budgets = sorted({budget for name, budget in rows if name != "full"}, reverse=True)
    names = list(dict.fromkeys(name for name, _ in rows if name != "full"))
    pairs = []
    for budget in budgets:
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                # the same samples under both methods: the second stands where the full cache usually does
                whole = compare(run.task, run.scored(rows[a, budget], rows[b, budget]), resamples, seed=0)[-1]
                apart = whole.interval is not None and (whole.interval[0] > 0 or whole.interval[1] < 0)
                pairs.append({"budget": budget, "a": a, "b": b, "difference": whole.difference,
                              "interval": whole.interval, "apart": apart})  # fmt: skip
    return {"task": run.task.name, "protocol": str(run.cfg.protocol), "weights": run.checkpoint.weights,
            "cells": cells, "pairs": pairs}  # fmt: skip


def show(task: dict[str, Any]) -> None:
    print(f"\n{task['task']}: score (difference from full, 95 % interval)")
    for cell in task["cells"]:
        low, high = cell["interval"] or (float("nan"), float("nan"))
        print(f"  {cell['method']:14} {cell['budget']:<5g} {cell['score']:7.2f} "
              f"({cell['difference']:+.2f}, {low:+.2f} to {high:+.2f})  bytes {cell['share']:.1%}")  # fmt: skip
    apart = [pair for pair in task["pairs"] if pair["apart"]]
    print(f"  {len(apart)} of {len(task['pairs'])} pairs of methods at one budget are apart")


if __name__ == "__main__":
    sys.exit(main())
