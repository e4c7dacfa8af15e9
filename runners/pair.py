"""A method beside the full cache: a few samples run alone, for their speeds; the rest are read once for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runners.cells import Run, in_batches
from runners.sweep import Sweep
from tasks.base import Example

# samples of each cell that run alone at least: a median of four is not moved by one slow sample
ALONE = 4


def complete(run: Run) -> None:
    """Compute what the records of a run's cells lack, as the group of two that a sweep makes of them.

    One after the other where they cannot share, for a sweep's reasons or with group.max_cells=1, and what one of the
    two has already. Raises BudgetMiss or UserError that ended one of the cells; what is finished is kept.
    """
    sweep = Sweep.of(run)
    shared = list(_to_share(run)) if _can_share(sweep) else []
    left = {example.id for batch in shared for example in batch}
    for cell in run.cells:
        run.complete(cell, left)
    if not shared:
        return
    sweep.share(shared, " and ".join(cell.name for cell in run.cells))
    for member in sweep.members:
        if member.stopped is not None:
            raise member.stopped


def _can_share(sweep: Sweep) -> bool:
    if sweep.run.only_shows or sweep.sizes.max_cells == 1:
        return False
    return len(sweep.members) == len(sweep.sharing) == 2


def _to_share(run: Run) -> Iterator[Sequence[Example]]:
    """Batches that neither cell has, without those that are spread over them to run alone."""
    records = [run.rows(cell) for cell in run.cells]
    lacking, alone = [], 0
    for example in run.examples:
        rows = [rows.get(example.id) for rows in records]
        found = [row for row in rows if row is not None and "error" not in row]
        if found:
            alone += not any("group" in row for row in found)
        elif not example.error:
            lacking.append(example)
    batches = list(in_batches(lacking, run.cfg.batch_size))
    n = min(len(batches), -(-max(0, ALONE - alone) // run.cfg.batch_size))
    picked = {i * len(batches) // n for i in range(n)}
    return (batch for i, batch in enumerate(batches) if i not in picked)
