"""The picture of a search for tables of bits: every table that was tried, the front, and layers all alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runners.learn.bits.search import Trial


def draw_front(
    tried: Sequence[Trial], alike: Sequence[Trial], front: Sequence[Trial], mode: str, picture: Path
) -> None:
    """Write `picture` (PNG): score against average bits, scales left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
        return [trial.bits for trial in trials], [trial.score for trial in trials]

    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.scatter(*points(tried), s=12, color="0.7", label="tables tried")
    axes.plot(*points(front), "o-", color="tab:blue", drawstyle="steps-post", label="front")
    axes.plot(*points(alike), "s", color="tab:red", label="all layers alike")
    for trial in alike:
        axes.annotate(str(trial.table[0]), (trial.bits, trial.score), xytext=(4, -12), textcoords="offset points")
    axes.set(xlabel="average bits per element, scales not counted", ylabel="score", title=f"mode {mode}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
