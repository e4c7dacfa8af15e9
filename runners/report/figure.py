"""A picture of panels: drawn without a screen, and written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.files import whole


@contextlib.contextmanager
def panels(path: Path, lines: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its axes [lines, columns], which becomes `path` once the block has ended.

    size: in inches. Raises CannotWrite.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield figure, axes
        with whole(path) as draft:
            figure.savefig(draft, dpi=120)
    finally:
        plt.close(figure)
