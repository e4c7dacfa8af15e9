"""What LoCoCo's trained compressors are worth and what they cost on the reference model.

    python benchmarks/lococo.py

For every compressor in assets/lococo/reference: its held-out perplexity beside dropping at equal slots, as its card has
it, and a prompt of 3,482 tokens, the length that the paper compresses into 128 slots: bytes held, with and without the
weights, seconds of the prompt and of a decode step, against the full cache and against dropping (eta=0), the median of
interleaved rounds. Writes benchmarks/results/lococo.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, only its own folder would be on the path

import torch  # noqa: E402

from methods import load_method  # noqa: E402
from methods.core.contract import Method  # noqa: E402
from methods.lococo import LoCoCo  # noqa: E402
from runners.engine.loading import find, load_model, load_tokenizer  # noqa: E402
from runners.learn.compression.text_rows import row_of  # noqa: E402

LENGTH, NEW = 3482, 64


def methods_of(card: dict[str, Any]) -> dict[str, Method]:
    """The full cache, the compressor that a card describes, and dropping at its slots."""
    knobs = {key: card[key] for key in ("kernel_size", "hh_keep_rate", "hidden_act")}
    trained = load_method("lococo", budget=card["slots"], block_size=card["chunk"], **knobs)
    assert isinstance(trained, LoCoCo)
    dropping = replace(trained, eta=0.0, local_len=card.get("local_len", 0))
    return {"full": load_method("full"), "lococo": trained, "eta=0": dropping}


@torch.inference_mode()
def once(model: Any, method: Method, ids: torch.Tensor) -> tuple[float, float, Any]:
    """Seconds of the prompt, median seconds of a decode step, and the ledger."""
    cache = method.cache_for(model)
    began = time.perf_counter()
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    prompt, steps = time.perf_counter() - began, []
    for _ in range(NEW):
        began = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        steps.append(time.perf_counter() - began)
    cache.check_budget()
    return prompt, median(steps), cache.report()


def measure(model: Any, ids: torch.Tensor, card: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Costs per method, and the card's comparison."""
    methods = methods_of(card)
    by_method: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            by_method[name].append(once(model, method, ids))
    costs = {}
    for name, runs in by_method.items():
        report = runs[-1][2]
        costs[name] = {
            "held_prompt": report.held_prompt,
            "held_end": report.held_end,
            "weights": report.adapter,
            "share": round(report.share, 4),
            "share_with_weights": round((report.held_prompt + report.adapter) / report.full_prompt, 4),
            "prompt_s": round(median(run[0] for run in runs), 4),
            "decode_ms": round(1000 * median(run[1] for run in runs), 3),
        }
    return {"slots": card["slots"], "chunk": card["chunk"], "held_out": card["held_out"], "costs": costs}


def show(result: dict[str, Any]) -> None:
    """One table per compressor."""
    print(f"\n{result['slots']} slots, chunks of {result['chunk']}")
    for text, measured in result["held_out"].items():
        print(f"held-out perplexity on {measured['tokens']:,} tokens of {text}")
        for name, nll in measured["nll"].items():
            gain = measured["gain"].get(name)
            said = "  {:+.4f} nats above lococo ({:+.4f} to {:+.4f})".format(*gain) if gain else ""
            print(f"  {name:15}{math.exp(nll):8.3f}{said}")
    print(f"{LENGTH:,} tokens of prompt, {NEW} decoded")
    for name, cost in result["costs"].items():
        print(
            f"  {name:15}{cost['held_prompt']:>10,} bytes ({cost['share']:.1%}), with weights "
            f"{cost['share_with_weights']:.1%}; prompt {cost['prompt_s']:.2f} s, decode {cost['decode_ms']:.2f} ms"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the trained compressors and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lococo.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    checkpoint = find("assets/reference")
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    ids = row_of(load_tokenizer(checkpoint), 0, 0, LENGTH, "held_out")[None]
    cards = sorted((ROOT / "assets" / "lococo" / "reference").glob("*.json"))
    if not cards:
        command = "python run.py model=reference runner=train method=lococo budget=128"
        print(f"no compressor in assets/lococo/reference; train one: {command}", file=sys.stderr)
        return 2
    read = sorted((json.loads(card.read_text(encoding="utf-8")) for card in cards), key=lambda card: card["slots"])
    results = [measure(model, ids, card, args.rounds) for card in read]
    for result in results:
        show(result)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    conditions = {**versions, "python": platform.python_version(), "threads": args.threads, "rounds": args.rounds}
    whole = {"prompt": LENGTH, "decoded": NEW, **conditions, "weights": checkpoint.weights, "compressors": results}
    args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
