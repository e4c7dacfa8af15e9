"""How figures look: one colour per method, one marker and line per family, hollow where memory is only simulated."""

from collections.abc import Sequence

# Okabe and Ito 2008, distinguishable with every common form of colour blindness; black is the full cache's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#882255")
FAMILIES = {
    "eviction": ("o", "-"),
    "quantization": ("s", "--"),
    "mixed": ("D", "-."),
    "merging": ("^", ":"),
    "low rank": ("v", "--"),
    "across layers": ("P", "-."),
    "sparse read": ("X", ":"),
    "trained": ("*", "-"),
    "baseline": (".", ":"),
    "other": ("o", "-"),
}
#: width of one column of a two-column paper, inches
COLUMN = 3.4
RC = {
    "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "legend.fontsize": 6.5, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2,
    "lines.markersize": 3.8, "axes.linewidth": 0.6, "svg.fonttype": "none", "pdf.fonttype": 42, "figure.dpi": 200,
}  # fmt: skip


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for every method, the same for the same set of methods; they repeat after eight."""
    others = [label for label in sorted(labels) if label != "full"]
    return {"full": "#000000", **{label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}}


def family(name: str) -> tuple[str, str]:
    """Marker and line of a family."""
    return FAMILIES.get(name, FAMILIES["other"])
