"""Lines below a table that tell a broken cache from a worse one: lengths, limits reached, samples that flipped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.base import Example

Rows = Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]


def compared(rows: Rows) -> bool:
    """Whether a method stands beside the full cache; two runs never take the same time, so equal records are one."""
    return any(ours != full for _, ours, full in rows)


def sides(rows: Rows) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The method's records, and the full cache's."""
    return [ours for _, ours, _ in rows], [full for _, _, full in rows]


def lengths(rows: Rows) -> str:
    """New tokens and the share of answers that ended at their limit, beside the full cache's."""
    means = []
    for side in sides(rows):
        mean = sum(one["tokens_out"] for one in side) / len(side)
        means.append((mean, sum(one["stop"] == "length" for one in side) / len(side)))
    (ours, cut), (full, full_cut) = means
    return f"new tokens per answer: {ours:.1f}, full {full:.1f}; ended at their limit: {cut:.1%}, full {full_cut:.1%}"


def held(rows: Rows) -> str | None:
    """Bytes held after the prompt, mean over steps, of the full cache's; None if nothing was decoded."""
    ours, full = (sum(row["ledger"]["mean_decode"] for row in side) for side in sides(rows))
    if not full:
        return None
    share = ours / full
    return f"KV bytes after the prompt, mean over steps: {share:.1%} of the full cache's"


def flips(rows: Rows, right: Callable[[Mapping[str, Any]], bool], what: str) -> str:
    """How many samples the full cache answers right and the method wrong, and the other way round."""
    lost = sum(right(full) and not right(ours) for _, ours, full in rows)
    won = sum(right(ours) and not right(full) for _, ours, full in rows)
    return f"{what}: {lost} right to wrong, {won} wrong to right, of {len(rows)}"
