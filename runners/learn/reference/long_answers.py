"""Documents with long answers: what `task=reasoning_decode` asks, with the whole answer as a model is taught it.

The texts are the task's own, so that a model which learns them can be asked there; its graphs, numbers and codes are
others than the task's samples, which are drawn by the task's seed.
"""

import random
from collections.abc import Callable

from tasks.documents import Document, Pool, Turn
from tasks.reasoning_decode import chain, graphs, passcode

STEP = 26  # characters of a step's line in an answer of `walks`, about
RESULT = 16  # characters of an operation and its result


def walks(pool: Pool, size: int, turns: int, steps: int = 0, nodes: int = 30) -> Document:
    """A depth-first walk, every step written down. steps: 0 for as many as fit `size` characters, at most 50."""
    rng = _source(pool)
    s = steps or max(2, min(50, 2 * nodes - 1, round(size / STEP)))
    least = (s + 2) // 2
    edges, _ = graphs.graph(s, (least, min(nodes, least + 8)), rng)
    context, _, question = graphs.prompt(edges, s).rstrip("\n").rpartition("\n\n")
    return _asked("walks", context, question, "\n" + graphs.solution(edges, s))


def sums(pool: Pool, size: int, turns: int, operations: int = 0) -> Document:
    """A number and operations on it, every result written down. operations: 0 for as many as fit `size` characters."""
    rng = _source(pool)
    first, listed = chain.draw(operations or max(2, min(64, round(size / RESULT))), rng)
    return _asked("sums", chain.prompt(first, listed).rstrip("\n"), "", chain.solution(first, listed))


def codes(pool: Pool, size: int, turns: int) -> Document:
    """A text that says a code and goes on; what is asked for at its end is the code."""
    code, before = f"{pool.rng.integers(10**5):05d}", pool.rng.random()
    lines = [_filler(pool, round(share * size)) for share in (before, 1 - before)]
    context = f"{passcode.PROMPT}{lines[0]}{passcode.SAID.format(code=code)}{lines[1]}"
    return _asked("codes", context, passcode.ASKED.strip(), f" {code}.", code)


LONG: dict[str, Callable[..., Document]] = {f.__name__: f for f in (walks, sums, codes)}


def _source(pool: Pool) -> random.Random:
    return random.Random(int(pool.rng.integers(2**62)))


def _filler(pool: Pool, size: int) -> str:
    text = ""
    while len(text) < size:
        text += f" {pool.filler()}"
    return text


def _asked(kind: str, context: str, question: str, answer: str, value: str = "") -> Document:
    return Document(kind, "", context, (Turn(question, answer, value or answer),))
