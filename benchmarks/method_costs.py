"""What every method costs beside the full cache, on a CPU: a row per method and prompt length.

    python benchmarks/method_costs.py                          # benchmarks/results/methods-cpu.json and .png
    python benchmarks/method_costs.py --methods snapkv,kivi --lengths 1024
    python benchmarks/method_costs.py --draw                   # the picture of what is there

Each method reads random tokens and decodes behind them in turns with the full cache, as `task=latency` does, both with
caches of the model's own type, and once more with a cache of 16-bit numbers, of which the bytes are. A ratio is formed
inside its round; the median of the rounds stands between their lowest and highest. What is in the file is not measured
again, unless --again is given. A method whose artefact of the model is missing is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402

from analysis import style  # noqa: E402
from benchmarks.speed import commit, hardware  # noqa: E402
from methods import build_method, load_method, method_names  # noqa: E402
from methods.core.contract import Method  # noqa: E402
from methods.core.errors import UserError  # noqa: E402
from runners.engine.generation import start  # noqa: E402
from runners.engine.latency import measure, random_tokens  # noqa: E402
from runners.model_setup import ModelSetup, plain  # noqa: E402
from tasks.base import Timed  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "methods-cpu.json"
BUDGET = 0.25
#: how methods without slots to drop are set beside a quarter of the slots
INSTEAD = {"kivi": ["method.bits=4"], "per_token": ["method.bits=4"], "lococo": ["budget=256"]}
SEARCHED = ("kvtuner", "kvtuner_per_token")  # of their tables of bits, the default


def main(words: Sequence[str]) -> int:
    """Measures what is missing, writes the file after every row and draws it; returns 0."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    ask.add_argument("--model", default="smollm2-135m", help="of conf/model")
    ask.add_argument("--methods", default=",".join(name for name in method_names() if name != "full"))
    ask.add_argument("--lengths", default="1024,4096", help="tokens of a prompt")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--steps", type=int, default=32, help="decode steps per round")
    ask.add_argument("--again", action="store_true", help="measure anew what is in the file")
    ask.add_argument("--draw", action="store_true", help="measure nothing")
    ask.add_argument("--out", type=Path, default=OUT)
    given = ask.parse_args(words)
    book = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {"rows": []}
    if not given.draw:
        wanted = [(name, int(n)) for name in given.methods.split(",") for n in given.lengths.split(",")]
        there = set() if given.again else {(row["method"], row["tokens"]) for row in book["rows"]}
        for row in rows(given.model, [one for one in wanted if one not in there], given.rounds, given.steps):
            print(told(row), flush=True)
            others = [one for one in book["rows"] if (one["method"], one["tokens"]) != (row["method"], row["tokens"])]
            book = {
                "command": "python benchmarks/method_costs.py",
                "model": given.model,
                "threads": torch.get_num_threads(),
                "hardware": hardware(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "rows": sorted([*others, row], key=lambda one: (one["method"], one["tokens"])),
            }
            given.out.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")
    style.save(draw(book), given.out.with_suffix(""))
    return 0


def rows(model: str, wanted: Sequence[tuple[str, int]], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """A row per method and length. Loads the model, which is the same for all."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        setup = ModelSetup(compose("config", [f"model={model}", "threads=1"]))
        for name, length in wanted:
            instead = INSTEAD.get(name, [] if name in SEARCHED else [f"budget={BUDGET}"])
            cfg = compose("config", [f"model={model}", f"method={name}", *instead])
            about = {"method": name, "tokens": length, "settings": " ".join(instead), "commit": commit()}
            try:
                method = build_method(name, plain(cfg.method))
                timed = Timed(length, batch=1, steps=steps, rounds=rounds)
                yield about | row_of(setup, method, timed)
            except UserError as error:
                yield about | {"not_run": str(error)}


def row_of(setup: ModelSetup, method: Method, timed: Timed) -> dict[str, Any]:
    """Times beside the full cache's and bytes of one method.

    prefill, decode: ratios to the full cache's, [median, lowest, highest] over rounds.  compress_ms: that reading the
    prompt takes longer.  workspace, peak: most that was held only for scoring, and in all while the prompt was read, as
    shares of the full cache.  bytes_16: held at the prompt's end in a cache of 16-bit numbers, as a share of the full
    cache's of that type.
    """
    load = round(os.getloadavg()[0], 2)
    ours, full = measure(setup.model, [method, load_method("full")], timed)
    assert ours.ledger is not None
    half = method.holding_in(torch.float16)
    with torch.inference_mode():
        session, _ = start(setup.model, half, random_tokens(setup.model, timed), [0])
    return {
        "family": method.family,
        "prefill": ratio(ours.prompts, full.prompts),
        "compress_ms": round(1000 * median(a - b for a, b in zip(ours.prompts, full.prompts, strict=True)), 2),
        "decode": ratio(ours.steps, full.steps),
        "full_ms": [round(1000 * full.prompt, 2), round(1000 * full.step, 3)],
        "bytes_16": round(session.cache.report().share, 4),
        "workspace": round(ours.ledger.workspace / ours.ledger.full_prompt, 4),
        "peak": round(ours.ledger.peak_prompt / ours.ledger.full_prompt, 4),
        "load": load,
    }


def ratio(ours: Sequence[float], full: Sequence[float]) -> list[float]:
    """Median, lowest and highest of the rounds' ratios."""
    each = [a / b for a, b in zip(ours, full, strict=True)]
    return [round(value, 4) for value in (median(each), min(each), max(each))]


def told(row: dict[str, Any]) -> str:
    """A row as a line."""
    what = f"{row['method']:18} {row['tokens']:5} tokens"
    if "not_run" in row:
        return f"{what}  not run: {row['not_run']}"
    return (
        f"{what}  prefill {row['prefill'][0]:.2f}  decode {row['decode'][0]:.2f}  "
        f"bytes {row['bytes_16']:.1%}  peak {row['peak']:.1%}"
    )


def draw(book: dict[str, Any]) -> Any:
    """Prefill and decode beside the full cache, a line per method, a marker per length."""
    from matplotlib.figure import Figure
    from matplotlib.pyplot import rc_context

    there = [row for row in book["rows"] if "not_run" not in row]
    names = sorted({row["method"] for row in there}, reverse=True)
    lengths = sorted({row["tokens"] for row in there})
    with rc_context(style.RC):
        figure = Figure(figsize=(2 * style.COLUMN, 0.17 * len(names) + 0.7), layout="constrained")
        panels = (("prefill", "prompt, times the full cache's"), ("decode", "decode step, times the full cache's"),
                  ("bytes_16", "bytes of a 16-bit cache, share of the full"))  # fmt: skip
        for axis, (key, what) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
            for i, length in enumerate(lengths):
                rows = [row for row in there if row["tokens"] == length]
                at = [names.index(row["method"]) + 0.15 * (i - (len(lengths) - 1) / 2) for row in rows]
                values = [row[key] if isinstance(row[key], list) else [row[key]] * 3 for row in rows]
                bars = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
                axis.errorbar(
                    [value for value, _, _ in values], at, xerr=bars, fmt="o", markersize=3,
                    color=style.COLOURS[i], label=f"{length:,} tokens",
                )  # fmt: skip
            axis.axvline(1, color="black", lw=0.6)
            axis.set_yticks(range(len(names)), names)
            axis.set_xlabel(what)
        if lengths:
            axis.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
