"""What is said below a table of the answers behind it: who answered them, and what of them was not scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.records import above
from runners.engine.thoughts import CLOSE


def each_answer(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A sample's row once for every answer to its prompt, which has what that answer's own is."""
    return [{**row, **answer} for answer in row["repeats"]] if "repeats" in row else [row]


def by_prefill(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """How many generated answers are the first token's alone, which the exact prefill gave; None where none is."""
    answered = [one for row in rows for one in each_answer(row)]
    answers = [one for row in answered for one in row.get("turns", [row]) if "by_prefill" in one]
    n = sum(one["by_prefill"] for one in answers)
    return f"{n} of {len(answers)} answered by the exact prefill" if n else None


def reasoning(rows: Iterable[Mapping[str, Any]], how: str) -> list[str]:
    """What became of the reasoning in answers; nothing where there is none and none was asked about.

    how: model.reasoning.
    """
    answered = [one for row in rows for one in each_answer(row)]
    held = [row["thoughts"] for row in answered if row.get("thoughts")]
    if not held and how != "keep":
        return []
    what = "answers" if any("repeats" in row for row in answered) else "samples"
    line = f"model.reasoning={how}: {len(held)} of {len(answered)} {what} hold a <think> block, "
    if how == "keep":
        return [f"{line}which is scored too"]
    open_ends = sum(not thoughts.rstrip().endswith(CLOSE) for thoughts in held)
    return [f"{line}which is not scored" + (f"; in {open_ends} of them it never ends" if open_ends else "")]


def misses(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How many samples are above their budget, in words; None where none is."""
    n = sum(map(above, rows))
    return f"{n} of {len(rows)} above the budget" if n else None
