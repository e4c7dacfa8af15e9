"""Lines of a record as a run writes them."""

from typing import Any

BYTES = ("full", "full_prompt", "held_prompt", "held_end", "peak_prompt", "peak_decode", "read_step", "padding")


def done(id: str, score: float = 1.0, **more: Any) -> dict[str, Any]:
    """The row of a finished sample; more: what it has besides or instead."""
    return {
        "id": id,
        "tags": {"subset": "qa", "category": "QA"},
        "prompt_end": "Who?",
        "answers": ["me"],
        "prediction": "me",
        "score": score,
        "tokens_in": 100,
        "tokens_out": 5,
        "cut": False,
        "batch": 1,
        "threads": 1,
        "ledger": {**dict.fromkeys(BYTES, 1000), "per_layer": [500, 500], "asked": 1000, "overhead": 0},
        "timings": {"prompt": 0.5, "question": 0.0, "decode": 0.1, "n_prompt": 100, "steps": 4},
        **more,
    }
