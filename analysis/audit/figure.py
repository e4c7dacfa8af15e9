"""W against the budget with its interval, one panel per task and pin; the line of chance is bold."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis import style


def draw(table: pd.DataFrame) -> Any:
    """The figure of the rows of `worth.table`, in which every row has W, low and high."""
    from matplotlib.figure import Figure
    from matplotlib.pyplot import rc_context

    panels = list(table.groupby(["model", "task", "protocol", "pin"], sort=False))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with rc_context(style.RC):
        figure = Figure(figsize=(style.COLUMN * columns, 2.3 * lines + 0.3), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, ((_, task, protocol, pin), rows) in zip(axes, panels):
            axis.axhline(0, color="black", lw=2.0, zorder=1)
            for i, (method, points) in enumerate(rows.groupby("method", sort=True)):
                look, points = style.look(str(method), "eviction"), points.sort_values("budget")
                at = points["budget"] * (1 + 0.02 * i)  # so that intervals stand beside each other
                bars = [points["W"] - points["low"], points["high"] - points["W"]]
                axis.errorbar(
                    at, points["W"], bars, color=look.colour, marker=look.marker, capsize=2, label=str(method)
                )
            axis.set_xscale("log")
            axis.set_xticks(sorted(set(rows["budget"])), [f"{budget:g}" for budget in sorted(set(rows["budget"]))])
            axis.minorticks_off()
            axis.set_title(f"{task}, {protocol}, pin={pin}")
            axis.set_xlabel("budget")
            axis.set_ylabel("W: score less random")
            axis.legend()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    return figure
