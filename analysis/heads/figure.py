"""Layouts side by side: kept share by layer and head, then every trait, then the kept positions of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis import style
from analysis.heads.layouts import Layout

BINS = 256  # of positions, across a picture
WRITTEN = 64  # cells of a heat map at most that have their number written in them


def draw(layouts: Sequence[Layout]) -> Any:
    """The figure, a column per layout; all have the same model and task."""
    from matplotlib.figure import Figure
    from matplotlib.pyplot import rc_context

    names = list(dict.fromkeys(name for one in layouts for name in one.traits))
    L, H = layouts[0].kept.shape
    tall = min(4.0, 0.9 + 0.12 * L)
    heights = [tall] * (1 + len(names)) + [min(6.0, 1.3 + 0.03 * L * H)]
    with rc_context(style.RC):
        size = (style.COLUMN * len(layouts), sum(heights) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(heights), len(layouts), squeeze=False, height_ratios=heights)
        for column, one in enumerate(layouts):
            shares = f"tokens held, {len(one.about['samples'])} samples"
            _map(figure, axes[0, column], one.kept, f"{one.label}: {shares}", (0.0, 1.0))
            for row, name in enumerate(names, start=1):
                if name in one.traits:
                    _trait(figure, axes[row, column], one.traits[name], name)
                else:
                    axes[row, column].set_visible(False)
            _positions(axes[-1, column], one)
    return figure


def _map(figure: Any, axis: Any, values: np.ndarray, title: str, limits: tuple[float, float]) -> None:
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="none")
    figure.colorbar(image, ax=axis, pad=0.02)
    _label(axis, title, values)
    if values.size <= WRITTEN:
        half = sum(limits) / 2
        for (layer, head), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < half else "black"
                axis.text(head, layer, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=6)


def _trait(figure: Any, axis: Any, values: np.ndarray, name: str) -> None:
    """Numbers as a heat map, words in colours of their own with a legend."""
    there = [value for value in values.ravel() if value is not None]
    if all(isinstance(value, int | float) for value in there):
        numbers = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
        _map(figure, axis, numbers, name, (0.0, max(there)))
        return
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    words = sorted({str(value) for value in there})
    colours = [style.COLOURS[i % len(style.COLOURS)] for i in range(len(words))]
    places = np.array([[np.nan if value is None else words.index(str(value)) for value in row] for row in values])
    axis.imshow(
        places, aspect="auto", cmap=ListedColormap(colours), vmin=-0.5, vmax=len(words) - 0.5, interpolation="none"
    )
    _label(axis, name, places)
    axis.legend(handles=[Patch(color=colour, label=word) for colour, word in zip(colours, words)])


def _label(axis: Any, title: str, values: np.ndarray) -> None:
    L, H = values.shape
    axis.set_title(title)
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, H, max(1, H // 8)))
    axis.set_yticks(range(0, L, max(1, L // 8)))


def _positions(axis: Any, one: Layout) -> None:
    """A line per layer and head, dark where the prompt's tokens are held."""
    L, H, tokens = one.held.shape
    bins = min(BINS, tokens)
    edges = np.linspace(0, tokens, bins + 1).round().astype(int)
    shares = np.add.reduceat(one.held.reshape(L * H, tokens), edges[:-1], axis=1) / np.diff(edges)
    axis.imshow(shares, aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=(0, tokens, L, 0), interpolation="none")
    axis.set_title(f"positions held of {one.about['samples'][0]}")
    axis.set_xlabel("token of the prompt")
    axis.set_ylabel("layer and head")
    axis.set_yticks(range(0, L, max(1, L // 8)))
