"""How long reading and reporting a large result folder takes: `python benchmarks/large_report.py`.

Makes records of random scores and words in a temporary folder, then times load (fresh and cached), points, the report,
and the figure, by the clock and in seconds of CPU, and their peak memory. On one thread of a busy two-core machine, 500
cells of 200 samples: 6 s of CPU to load, 10 s to report, 300 MiB.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from analysis.frontier import draw_frontier
from analysis.load import load_results
from analysis.points import points
from analysis.report import page


def words(source: random.Random, n: int) -> str:
    """About n characters that compress no better than prose does."""
    letters = "etaoinshrdlucmfw"
    return " ".join("".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(n // 6))


def write(root: Path, cells: int, samples: int) -> None:
    """`cells` records on tasks of 25 cells each, with texts as long as real ones."""
    source = random.Random(0)
    for c in range(cells):
        task, i = f"task-{c // 25}", c % 25
        method, budget = ("full", 1.0) if i == 0 else (f"method{i % 8}", (0.1, 0.25, 0.5)[i % 3])
        folder = root / "model" / task / f"{method}-b{budget}-{i}"
        folder.mkdir(parents=True)
        identity = {
            "model": {"name": "model", "weights": "0"}, "method": {"name": method, "config": {"budget": budget}},
            "budget": budget, "task": {"name": task, "fingerprint": {}}, "protocol": "aware", "seed": 0, "dtype": "x",
        }  # fmt: skip
        runs = [{"conditions": {"torch": "0"}, "commit": "0", "family": "eviction", "command": "python run.py"}]
        (folder / "cell.json").write_text(
            json.dumps({"format": 1, "identity": identity, "runs": runs}), encoding="utf-8"
        )
        sizes = ["full", "full_prompt", "held_prompt", "held_end", "read_step", "peak_prompt", "peak_decode"]
        held = int(budget * 10**6)
        ledger = {name: 10**6 for name in sizes} | {"held_prompt": held, "per_layer": [held // 32] * 32}
        times = {"prompt": 1.0, "question": 0.0, "decode": 1.0, "n_prompt": 1000, "steps": 10}
        prompts = random.Random(task)  # the same for all cells of a task
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for s in range(samples):
                row = {
                    "id": f"set{s % 6}/{s}", "tags": {"subset": f"set{s % 6}", "category": f"c{s % 3}"},
                    "prompt_end": words(prompts, 300), "answers": [words(prompts, 40)],
                    "prediction": words(source, 120), "score": float(source.random() < 0.5 + budget / 2),
                    "tokens_in": 1000, "tokens_out": 10, "batch": 1, "ledger": ledger, "timings": times,
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Make the records, time the analysis of them, and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, given.cells, given.samples)
        began, spent = time.perf_counter(), time.process_time()

        def lap(what: str) -> None:
            nonlocal began, spent
            clock, cpu = time.perf_counter() - began, time.process_time() - spent
            print(f"{what:24s} {clock:6.1f} s, {cpu:6.1f} s of CPU", flush=True)
            began, spent = time.perf_counter(), time.process_time()

        results = load_results(root)
        lap("load")
        results = load_results(root)
        lap("load, cached")
        table = points(results)
        lap("points")
        html = page(results)
        lap("report, points included")
        draw_frontier(table, "held")
        lap("figure")
        print(f"report {len(html) / 2**20:.1f} MiB, {len(table)} points")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
