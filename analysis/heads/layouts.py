"""What `runner=heads` wrote, read back: what a method held of a prompt, by layer and KV head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.load import NothingToRead


@dataclass(frozen=True)
class Layout:
    """One method on the prompts of a task.

    about: what the file says of the run.  kept [L, H]: mean share of a prompt's tokens that a head holds, NaN where a
    layer has no list of slots.  traits: by name, [L, H] of words or numbers, None where a layer has none.
    tokens: of the sample whose positions these are.  held [L, H, tokens]: whether a head holds the position.
    """

    about: dict[str, Any]
    kept: np.ndarray
    traits: dict[str, np.ndarray]
    tokens: int
    held: np.ndarray

    @property
    def label(self) -> str:
        """The method and its budget."""
        return f"{self.about['method']} {self.about['budget']:g}"

    @property
    def place(self) -> tuple[str, str, str]:
        """Model, task and protocol: what two layouts must have in common to stand beside each other."""
        return self.about["model"], self.about["task"], self.about["protocol"]


def read_layouts(folder: Path) -> tuple[list[Layout], list[str]]:
    """All layouts below a folder, or that of one file, in order; and what could not be read, a line each.

    Raises NothingToRead where there is none.
    """
    found, problems = [], []
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
        try:
            found.append(layout(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            problems.append(f"{path}: not what runner=heads writes ({type(error).__name__}: {error})")
    if not any(np.isfinite(one.kept).any() for one in found):
        advice = f"{folder}: nothing to draw; python run.py runner=heads method=NAME makes it"
        raise NothingToRead("; ".join([advice, *problems]))
    return sorted(found, key=lambda one: (one.place, one.about["method"], -one.about["budget"])), problems


def layout(file: dict[str, Any]) -> Layout:
    """A layout from what a file holds. Raises KeyError, TypeError or ValueError for a file of another kind."""
    heads = max((len(of_layer) for of_layer in file["kept"] if of_layer is not None), default=1)
    L, tokens = len(file["kept"]), file["tokens"][0]
    kept, held = np.full((L, heads), np.nan), np.zeros((L, heads, tokens), dtype=bool)
    traits: dict[str, np.ndarray] = {}
    for i, (shares, of_layer, places) in enumerate(zip(file["kept"], file["traits"], file["positions"], strict=True)):
        if shares is not None:
            kept[i, : len(shares)] = shares
        for name, value in of_layer.items():
            here = traits.setdefault(name, np.full((L, heads), None, dtype=object))
            here[i] = value if isinstance(value, list) else [value] * heads
        for head, runs in enumerate(places or ()):
            for begin, length in _pairs(runs):
                held[i, head, begin : begin + length] = True
    about = {key: value for key, value in file.items() if key not in ("kept", "traits", "positions")}
    return Layout(about, kept, traits, tokens, held)


def _pairs(runs: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(runs[::2], runs[1::2], strict=True))
