"""How figures look: a colour per method in all of them, a marker per family, hollow where a saving is simulated."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.files import whole

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
PDF = {"pdf.fonttype": 42}  # TrueType: publishers refuse bitmap fonts
SVG = {"svg.fonttype": "none", "svg.hashsalt": "frontier"}


#: the field's methods in the order in which they are given colours: the first eight have one each. A method that is
#: not named here has a colour all the same, by its name.
METHODS = (
    "snapkv", "h2o", "nacl", "kivi", "streaming_llm", "keyformer", "qfilters", "adakv",
    "random", "tova", "kvtuner", "lococo", "scissorhands", "per_token", "window", "snapkv+kivi",
    "pyramidkv", "l2norm", "keydiff", "chunkkv", "lagkv", "expected_attention", "compactor", "criticalkv",
    "defensivekv", "cam", "headkv", "duo_attention", "fastgen", "corm", "kv_compress", "kvzip",
    "kvzap", "anchor_coder", "quest", "cluster_kv", "squeezed_attention", "shadowkv", "cascading", "elastic_cache",
    "kvmerger", "subgen", "zipvl", "attention_matching", "kvquant", "qaq", "zipcache", "coupled_quantization",
    "quantized_pruning", "hack", "turboquant", "kvarn", "aqua_kv", "lorc", "think", "minicache",
    "kvsharer", "palu", "rkv", "triattention", "dms", "qfilters_capped", "kvtuner_per_token", "fastkvzip",
)  # fmt: skip
STROKES = ("-", "--", "-.", ":")
#: how markers of one method under several settings are filled; the first is for the method itself
FILLS = ("full", "left", "bottom", "right", "top")


@dataclass(frozen=True)
class Look:
    """A method's colour, its marker and line, whether its markers are ringed, and a setting's fill (of FILLS)."""

    colour: str
    marker: str
    stroke: str
    ringed: bool
    fill: int = 0


def look(label: str, family: str) -> Look:
    """How a curve is drawn: by its method's name, family and settings, whatever else is in the figure.

    label: the method's name, and the settings that tell the curve from others of the method.
    """
    method, _, settings = label.partition(" ")
    at = METHODS.index(method) if method in METHODS else zlib.crc32(method.encode()) % len(METHODS)
    tier, colour = divmod(at, len(COLOURS))
    marker, stroke = FAMILIES.get(family, FAMILIES["other"])
    fill = 1 + zlib.crc32(settings.encode()) % (len(FILLS) - 1) if settings else 0
    stroke = STROKES[(STROKES.index(stroke) + tier // 2) % len(STROKES)]
    return Look(COLOURS[colour], marker, stroke, tier % 2 == 1, fill)


def looks(families: Mapping[str, str]) -> dict[str, Look]:
    """How every curve is drawn, from its family by its label; family by family."""
    order = [*FAMILIES, *sorted(set(families.values()) - set(FAMILIES))]
    return {
        label: look(label, families[label]) for label in sorted(families, key=lambda x: (order.index(families[x]), x))
    }


def line(look: Look, hollow: bool) -> dict[str, Any]:
    """The look as matplotlib's arguments."""
    return {
        "color": look.colour,
        "marker": look.marker,
        "linestyle": look.stroke,
        "fillstyle": FILLS[look.fill],
        "markerfacecolor": "white" if hollow else look.colour,
        "markerfacecoloralt": "white",
        "markeredgecolor": "black" if look.ringed else look.colour,
        "markeredgewidth": 0.9,
    }


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as path.png, path.svg and path.pdf, with the fonts inside. Raises CannotWrite."""
    import matplotlib as mpl

    with whole(path.with_suffix(".png")) as draft:
        figure.savefig(draft, dpi=250, metadata={"Software": None})
    with mpl.rc_context(SVG), whole(path.with_suffix(".svg")) as draft:
        figure.savefig(draft, metadata={"Date": None})
    with mpl.rc_context(PDF), whole(path.with_suffix(".pdf")) as draft:
        figure.savefig(draft, metadata={"CreationDate": None})
