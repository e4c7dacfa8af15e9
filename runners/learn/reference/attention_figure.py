"""The picture of where a model's heads look, and of which channels its keys use."""

from pathlib import Path
from typing import Any


def draw_attention(attention: list[dict[str, list[float]]], keys: list[list[list[float]]], picture: Path) -> None:
    """Write `picture` (PNG).

    attention: by layer, name of a place and query head, the share of attention it gets.  keys: by layer, KV head and
    channel, the mean absolute value.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[list[float]] = [channels for layer in keys for channels in layer]
    names = [f"{i}.{h}" for i, layer in enumerate(keys) for h in range(len(layer))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", width_ratios=(1, 1.3))
    heads = [(i, h) for i, layer in enumerate(attention) for h in range(len(next(iter(layer.values()))))]
    marks = {
        "first token": ("#D55E00", "v"), "last 16 tokens": ("#0072B2", "o"), "copied token": ("#CC79A7", "D"),
        "top 5 % of slots": ("#009E73", "_"),
    }  # fmt: skip
    for name, (colour, mark) in marks.items():
        shares = [100 * attention[i][name][h] for i, h in heads]
        left.plot(range(len(heads)), shares, marker=mark, linestyle="none", color=colour, label=name)
    left.set_xticks(range(len(heads)), [f"{i}.{h}" for i, h in heads])
    left.set(xlabel="layer.head", ylabel="% of attention", ylim=(-3, 103))
    left.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    left.grid(alpha=0.3)
    shown: Any = right.imshow(rows, aspect="auto", cmap="magma", interpolation="nearest")
    right.set_yticks(range(len(rows)), names)
    right.set(xlabel="channel of the key, after RoPE", ylabel="layer.KV head")
    figure.colorbar(shown, ax=right, label="mean absolute value")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
