"""Lines of a record as a run writes them."""

from collections.abc import Mapping
from typing import Any

import pytest

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


class Near(list):
    """Numbers that equal others which are as near as rounding leaves them: a row of a batch is added up in another
    order."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and list(self) == pytest.approx(list(other), rel=1e-3, abs=1e-6)

    __hash__ = None


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's row without what depends on who shared a pass; what was forced equals up to rounding."""
    kept = {key: value for key, value in row.items() if key not in ("timings", "group")}
    if "forced" in kept:
        forced = dict(kept["forced"])
        numbers = Near([*forced.pop("kl"), forced.pop("dnll") or 0.0])
        kept["forced"] = forced | {"numbers": numbers}
    return kept
