"""The figure of a training run: its losses, and held-out text against dropping."""

import json
from pathlib import Path
from typing import Any

import torch


def draw_training(log: Path, held_out: dict[str, Any], picture: Path) -> None:
    """Write `picture` (PNG): loss while training, held-out perplexity against dropping at equal slots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    left.plot(*zip(*((e["batch"], e["loss"]) for e in entries if "loss" in e)), label="read behind a compression")
    left.set(xlabel="batches", ylabel="loss, nats per token")
    left.plot(*zip(*((e["batch"], e["chosen_on"]) for e in entries if "chosen_on" in e)), marker=".", label="held out")
    left.legend(fontsize=8)
    for i, (text, measured) in enumerate(held_out.items()):
        names = list(measured["gain"])
        gain, low, high = torch.tensor([measured["gain"][name] for name in names]).T
        heights = torch.arange(len(names)) + 0.2 * i
        right.errorbar(gain, heights, xerr=torch.stack((gain - low, high - gain)), fmt="o", capsize=3, label=text)
        right.set_yticks(range(len(names)), names)
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="loss above the trained compressor's, nats per token")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)
