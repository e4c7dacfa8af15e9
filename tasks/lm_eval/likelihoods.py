"""What is said of compared choices: how much was compressed, how far likelihoods moved, what the full cache guesses."""

import math
from collections.abc import Sequence

from tasks.scoring import remarks


def margin(likelihoods: Sequence[float], gold: int) -> float:
    """The right choice's log-likelihood less that of the best other one, in nats."""
    return likelihoods[gold] - max(value for i, value in enumerate(likelihoods) if i != gold)


def lengths(rows: remarks.Rows) -> str:
    """Mean tokens of what was compressed; a small share of a short prompt is a handful of slots."""
    ours = remarks.sides(rows)[0]
    mean = sum(row["tokens_context"] for row in ours) / len(ours)
    held, full = (sum(row["ledger"][key] for row in ours) for key in ("held_prompt", "full_prompt"))
    return f"compressed: {mean:.1f} tokens per sample, to {mean * held / full:.1f} tokens' bytes on average"


def moved(rows: remarks.Rows) -> str | None:
    """How far the right choices' log-likelihoods moved, and their margins."""
    known = []
    for example, *both in rows:
        if (n := example.tags.get("n", 0)) > 1:
            ours, full = (row["likelihoods"][:n] for row in both)
            known.append((example.tags["gold"], ours, full))
    if not known:
        return None
    by = sum(abs(ours[gold] - full[gold]) for gold, ours, full in known) / len(known)
    a = sum(margin(ours, gold) for gold, ours, _ in known) / len(known)
    b = sum(margin(full, gold) for gold, _, full in known) / len(known)
    return (
        f"log-likelihood of the right choice: moved by {by:.3f} nats on average; "
        f"before the best other one by {a:+.3f}, full {b:+.3f}"
    )


def guessed(rows: remarks.Rows) -> str | None:
    """The tasks whose score with the full cache is within three standard errors of chance."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for example, _, full in rows:
        if example.tags.get("n", 0) > 1:
            by_task.setdefault(example.tags["subset"], []).append((1 / example.tags["n"], full["score"]))
    near = []
    for name, pairs in by_task.items():
        chance, score = (sum(one[i] for one in pairs) / len(pairs) for i in (0, 1))
        if score - chance <= 3 * math.sqrt(chance * (1 - chance) / len(pairs)):
            near.append(f"{name} {100 * score:.1f} (chance {100 * chance:.1f})")
    return f"full cache within three standard errors of chance, no evidence: {', '.join(near)}" if near else None
