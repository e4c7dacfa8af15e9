"""Draw what `python -m kernels.bench` wrote: every op's share of the machine's ceiling, a panel per setting.

python benchmarks/plot_ops.py benchmarks/MACHINE.json   # benchmarks/MACHINE.png
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.style import COLOURS, RC  # noqa: E402


def main(words: Sequence[str]) -> int:
    """Writes the figure beside the file; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("record", type=Path)
    path = parser.parse_args(words).record
    out = path.with_suffix(".png")
    draw_ops(json.loads(path.read_text(encoding="utf-8")), out)
    print(out)
    return 0


def draw_ops(record: dict[str, Any], out: Path) -> None:
    """One bar per op; inside a CUDA graph, where that was measured, a second, darker one over it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(row["setting"] for row in record["rows"]))
    panels = [[row for row in record["rows"] if row["setting"] == setting] for setting in settings]
    with plt.rc_context(RC):
        heights = [len(rows) + 1.5 for rows in panels]
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(5.2, 0.17 * sum(heights) + 0.4), sharex=True, squeeze=False,
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        for axis, setting, rows in zip(axes[:, 0], settings, panels, strict=True):
            levels = range(len(rows), 0, -1)
            axis.barh(levels, [row["share_of_ceiling"] for row in rows], color=COLOURS[5], label="started from Python")
            graphs = [(at, captured_share(row)) for at, row in zip(levels, rows) if "captured_seconds" in row]
            if graphs:
                at, share = zip(*graphs, strict=True)
                axis.barh(at, share, height=0.35, color=COLOURS[0], label="in a CUDA graph")
            axis.set_yticks(list(levels), [row["op"] for row in rows])
            axis.axvline(1, color="black", lw=0.6)
            axis.set_title(setting, loc="left")
        if any("captured_seconds" in row for row in record["rows"]):
            axes[0, 0].legend(loc="lower right", frameon=False)
        copied, multiplied = record["ceilings"]["bytes_per_second"] / 1e9, record["ceilings"]["flops"] / 1e12
        axes[-1, 0].set_xlabel(
            f"share of the ceiling\n{record['machine']['device']}, {record['dtype']}: {copied:.0f} GB/s copied, "
            f"{multiplied:.2f} TFLOP/s multiplied"
        )
        figure.savefig(out, dpi=160)
        plt.close(figure)


def captured_share(row: dict[str, Any]) -> float:
    """The share of the ceiling inside a CUDA graph."""
    return row["share_of_ceiling"] * row["seconds"] / row["captured_seconds"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
