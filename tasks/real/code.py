"""Lines of modules of which a like stands further up: what comes next can be copied and changed."""

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher

import numpy as np

BEFORE = 100  # lines of context
MOST = 5_000  # characters of it
NEAR = 8  # lines right before that stay in the question
LIKE = 0.75  # of a line and the one further up, as difflib measures it
LIKE_BEFORE = 0.6  # of the two lines before them


def places(modules: Mapping[str, str], rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Context, the lines right before, and the line that comes next; modules take turns."""
    names = list(modules)
    left = {name: list(rng.permutation(_alike(modules[name].split("\n")))) for name in names}
    while any(left.values()):
        for i in rng.permutation(len(names)):
            if left[names[i]]:
                lines, at = modules[names[i]].split("\n"), int(left[names[i]].pop())
                before = lines[at - BEFORE : at - NEAR]
                if sum(map(len, before)) <= MOST:
                    yield "\n".join(before), "\n".join(lines[at - NEAR : at]) + "\n", lines[at]


def _alike(lines: list[str]) -> list[int]:
    """Places of lines that have a like in their context, behind one that is like the one before it; none twice in
    twenty lines, so that no two samples ask for the same."""
    found: list[int] = []
    for at in range(BEFORE, len(lines)):
        if (found and at - found[-1] < 20) or not _is_code(lines[at]):
            continue
        for other in range(at - BEFORE + 1, at - NEAR):
            if (
                lines[other] != lines[at]
                and _ratio(lines[other], lines[at], LIKE) >= LIKE
                and _ratio(lines[other - 1], lines[at - 1], LIKE_BEFORE) >= LIKE_BEFORE
            ):
                found.append(at)
                break
    return found


def _is_code(line: str) -> bool:
    """A statement of middle length, without the marks at which edit similarity passes over a line."""
    text = line.strip()
    marks = any(mark in text for mark in ("`", "#", "//"))
    return 20 <= len(text) <= 76 and not marks and ("=" in text or text[-1] in "):,")


def _ratio(one: str, other: str, least: float) -> float:
    """How like two lines are, 0 where their lengths or letters rule `least` out."""
    one, other = one.strip(), other.strip()
    if 2 * min(len(one), len(other)) < least * (len(one) + len(other)):
        return 0.0
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= least else 0.0
