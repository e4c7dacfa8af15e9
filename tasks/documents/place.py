"""Sentences at given depths of other sentences."""

from collections.abc import Sequence

from tasks.documents.pools import Pool


def place_lines(filler: Sequence[str], lines: Sequence[str], depths: Sequence[float]) -> str:
    """A text of `filler` with each of `lines` at its depth, 0 in front of all filler and 1 behind it.

    Lines of one depth keep their order; as in other documents, a paragraph ends after eight sentences.
    """
    slots = [round(depth * len(filler)) for depth in depths]
    parts: list[str] = []
    for at in range(len(filler) + 1):
        parts += [line for line, slot in zip(lines, slots) if slot == at]
        parts += filler[at : at + 1]
    return parts[0] + "".join(("\n" if i % 8 == 0 else " ") + part for i, part in enumerate(parts[1:], start=2))


def filler_of(pool: Pool, characters: int) -> list[str]:
    """Unlike sentences of about so many characters together."""
    sentences, used = [], 0
    while used < characters:
        sentences.append(pool.filler())
        used += len(sentences[-1]) + 1
    return sentences


def noise_of(pool: Pool, characters: int) -> list[str]:
    """The same five sentences again and again, about so many characters together."""
    group = [pool.filler() for _ in range(5)]
    size = sum(map(len, group)) + len(group)
    return group * max(1, round(characters / size))
