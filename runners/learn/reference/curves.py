"""The picture of a training run: losses, and recall by ability, over the tokens seen."""

import json
from pathlib import Path


def draw_curves(log: Path, picture: Path) -> None:
    """Write `picture` (PNG) from the lines of a training log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [e for e in entries if "loss" in e]
    recalls = [e for e in entries if "recall" in e]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5))
    colors = plt.get_cmap("tab20").colors
    for key, label in (("loss", "all tokens, weighted"), ("answer_loss", "answers")):
        points = [(e["tokens"] / 1e6, e[key]) for e in losses if e[key] is not None]
        span = max(1, len(points) // 200)
        smooth = [
            (points[i][0], sum(y for _, y in points[i : i + span]) / span)
            for i in range(0, len(points) - span + 1, span)
        ]
        left.plot(*zip(*smooth), label=label)
    left.set(xlabel="million tokens", ylabel="loss, nats per token", yscale="log")
    for i, ability in enumerate(recalls[-1]["recall"] if recalls else ()):
        points = [(e["tokens"] / 1e6, e["recall"][ability]) for e in recalls if ability in e["recall"]]
        right.plot(*zip(*points), label=ability, color=colors[i % len(colors)], marker=".")
    right.set(xlabel="million tokens", ylabel="exact match on held-out documents", ylim=(-0.02, 1.02))
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
