"""How figures look: one marker and line per family, a colour per method in it, hollow where a saving is simulated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito 2008, distinguishable with every common form of colour blindness, and two dark ones; black is for full
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288")
FAMILIES = {
    "eviction": ("o", "-"),
    "quantization": ("s", "--"),
    "mixed": ("D", "-."),
    "merging": ("^", ":"),
    "low rank": ("v", "--"),
    "across layers": ("P", "-."),
    "sparse read": ("X", ":"),
    "trained": ("*", "-"),
    "baseline": ("d", ":"),
    "other": ("p", "-."),
}
#: width of one column of a two-column paper, inches
COLUMN = 3.4
RC = {
    "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "legend.fontsize": 6.5, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.1,
    "lines.markersize": 3.8, "axes.linewidth": 0.6, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
    "legend.labelspacing": 0.3,
}  # fmt: skip
FRONT: dict[str, Any] = {"color": "#c9c9c9", "lw": 2.6, "solid_joinstyle": "round", "zorder": 2, "alpha": 0.8}
#: letters stay letters, and the same records give the same file
SVG = {"svg.fonttype": "none", "svg.hashsalt": "frontier"}


@dataclass(frozen=True)
class Look:
    """A method's colour, its family's marker and line, and whether its markers are ringed: the colours once more."""

    colour: str
    marker: str
    stroke: str
    ringed: bool


def looks(families: Mapping[str, str]) -> dict[str, Look]:
    """How every method is drawn, from its family by its label: in a family no two look alike (up to sixteen).

    The same for the same set of methods; family by family.
    """
    made = {}
    found = set(families.values())
    for family in [name for name in FAMILIES if name in found] + sorted(found - set(FAMILIES)):
        marker, stroke = FAMILIES.get(family, FAMILIES["other"])
        start = len(made)  # so that few methods have a colour each, whatever their families
        for i, label in enumerate(sorted(label for label, own in families.items() if own == family)):
            colour = COLOURS[(start + i) % len(COLOURS)]
            made[label] = Look(colour, marker, stroke, i // len(COLOURS) % 2 == 1)
    return made


def line(look: Look, hollow: bool) -> dict[str, Any]:
    """The look as matplotlib's arguments."""
    return {
        "color": look.colour,
        "marker": look.marker,
        "linestyle": look.stroke,
        "markerfacecolor": "white" if hollow else look.colour,
        "markeredgecolor": "black" if look.ringed else look.colour,
        "markeredgewidth": 0.9,
    }


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as path.png and path.svg."""
    import matplotlib as mpl

    figure.savefig(path.with_suffix(".png"), dpi=250, metadata={"Software": None})
    with mpl.rc_context(SVG):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
