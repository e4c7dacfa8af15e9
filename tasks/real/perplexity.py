"""ppl-real: pieces of prose, profiles and code that are predicted token by token."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks.bundles import write_rows
from tasks.real import profile as country
from tasks.real.needle import paragraphs
from tasks.real.sources import Sources

TEXTS = 16  # of each kind
# characters of a text of about 1,024 tokens or more
PROSE, PROFILE, CODE = 4_800, 3_600, 4_400


def prose(sources: Sources, rng: np.random.Generator) -> Iterator[str]:
    """Consecutive verses."""
    for start in rng.permutation(len(sources.verses) - 1):
        text = paragraphs(sources.verses[start : start + 200])[:PROSE]
        if len(text) == PROSE:
            yield text


def profiles(sources: Sources, rng: np.random.Generator) -> Iterator[str]:
    """The beginning of a profile's entries."""
    names = list(sources.profiles)
    for i in rng.permutation(len(names)):
        lines = [line for _, line in country.lines_of(sources.profiles[names[i]])]
        text = "\n".join([f"Country profile of {names[i][1]}", *lines])[:PROFILE]
        if len(text) == PROFILE:
            yield text


def modules(sources: Sources, rng: np.random.Generator) -> Iterator[str]:
    """A module from one of its lines on."""
    names = list(sources.modules)
    for i in rng.permutation(len(names)):
        lines = sources.modules[names[i]].split("\n")
        text = "\n".join(lines[int(rng.integers(len(lines))) :])[:CODE]
        if len(text) == CODE:
            yield text


KINDS = {"prose": prose, "profiles": profiles, "code": modules}


def write(folder: Path, sources: Sources, seed: int) -> None:
    """A file of texts per kind."""
    for index, (name, draw) in enumerate(KINDS.items()):
        texts = draw(sources, np.random.default_rng([seed, 1, index]))
        write_rows(folder, name, ({"text": text} for text, _ in zip(texts, range(TEXTS))))
