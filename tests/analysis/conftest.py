"""Result folders in the records' own format, made of chosen scores."""

import json
from pathlib import Path

import pytest


class Book:
    """Writes records below a folder."""

    def __init__(self, root: Path):
        self.root = root

    def cell(
        self, method="full", scores=(1.0,), budget=1.0, *, task="quiz-mini", share=None, seed=0, subsets=None,
        protocol="aware", config=None, notes=None, metric=None, conditions=1, model="tiny", predictions=None,
        fingerprint=None, weights="sha256:0", dtype="float32", torch="", rows=None, code=None, files=None, place=None,
        began=None, cache_dtype=None,
    ) -> Path:  # fmt: skip
        """One cell whose samples have these scores; None is a failed sample. Subsets default to one.

        rows: for every sample, what its line has besides or instead.  code, files, place, began: of format 2, in which
        the weights are a condition too.
        """
        own = hash(str((config, fingerprint, weights, dtype, code, files, cache_dtype)))
        folder = self.root / model / task / f"{method}-b{budget:g}-{protocol}-{seed}-{abs(own) % 10**8}"
        folder.mkdir(parents=True)
        identity = {
            "model": {"name": model, "weights": weights},
            "method": {"name": method, "config": {"budget": budget, "seed": seed, **(config or {})}},
            "budget": budget,
            "task": {"name": task, "fingerprint": fingerprint or {}} | ({"metric": metric} if metric else {}),
            "protocol": protocol,
            "seed": seed,
            "dtype": dtype,
            **({"passes": {"cache_dtype": cache_dtype}} if cache_dtype else {}),
        }
        family = {"full": "baseline", "kivi": "quantization"}.get(method, "eviction")
        runs = [
            {
                "conditions": {"torch": torch or str(i), "code": code or method},
                "commit": "abc",
                "family": family,
                **(notes or {}),
            }
            for i in range(conditions)
        ]
        if began is not None:
            identity["model"].pop("weights")
            for run in runs:
                run["conditions"] |= {"weights": weights, **({"files": files} if files else {})}
                run |= {"began": began, "place": place or ""}
        form = 1 if began is None else 2
        (folder / "cell.json").write_text(json.dumps({"format": form, "identity": identity, "runs": runs}))
        share = budget if share is None else share
        lines = []
        for i, score in enumerate(scores):
            subset, category = (subsets or [("qa", "QA")] * len(scores))[i]
            tags = {"subset": subset, "category": category}
            row = {"id": f"{subset}/{i}", "tags": tags, "run": i % conditions}
            other = dict(rows[i]) if rows else {}
            row["tags"] |= other.pop("tags", {})
            if score is None:
                lines.append(row | {"error": "no memory"})
                continue
            ledger = {
                "full": 1000, "full_prompt": 1000, "held_prompt": round(1000 * share), "held_end": round(1000 * share),
                "read_step": round(1000 * share), "peak_prompt": 1000, "peak_decode": round(1000 * share),
                "per_layer": [round(500 * share)] * 2, "share": share,
            }  # fmt: skip
            times = {"prompt": 0.5, "question": 0.0, "decode": 0.1, "n_prompt": 100, "steps": 10}
            lines.append(
                row | {
                    "prediction": (predictions or ["yes"] * len(scores))[i], "score": score, "tokens_in": 100,
                    "tokens_out": 5, "batch": 1, "ledger": ledger, "timings": times, "prompt_end": "Who?",
                    "answers": ["me"],
                } | other
            )  # fmt: skip
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)
