"""needle-real: prose that needles are hidden in, consecutive verses of the King James Bible."""

from pathlib import Path

import numpy as np

from tasks.real.sources import Sources

CHARACTERS = 120_000  # about 28,000 tokens
VERSES = 5  # of a paragraph


def write(folder: Path, sources: Sources, seed: int) -> None:
    """haystack.txt: verses from a place that the seed chooses, in paragraphs."""
    rng = np.random.default_rng([seed, 0])
    length = np.cumsum([len(verse) + 1 for verse in sources.verses])
    last = int(np.searchsorted(length, length[-1] - CHARACTERS, side="right"))
    start = int(rng.integers(max(1, last)))
    end = int(np.searchsorted(length, (length[start - 1] if start else 0) + CHARACTERS, side="right"))
    text = paragraphs(sources.verses[start:end])
    (folder / "haystack.txt").write_text(text + "\n", newline="\n", encoding="utf-8")


def paragraphs(verses: tuple[str, ...]) -> str:
    """A few verses to a line."""
    return "\n".join(" ".join(verses[at : at + VERSES]) for at in range(0, len(verses), VERSES))
