"""chain: a number, and operations on it one after the other, each modulo 1000."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from tasks.base import Example

PROMPT = """\
Begin with {first}. Do these operations one after the other, and keep only the last three digits of every result (the \
result modulo 1000; below 0, add 1000).

{operations}

Write one line per operation with its result, then the last result as \\boxed{{result}}.

"""
MODULUS = 1000
SIGNS = {"+": (1, 99), "-": (1, 99), "x": (2, 9)}  # smallest and largest number behind each


def apply(value: int, sign: str, number: int) -> int:
    """One operation, modulo 1000."""
    return (value * number if sign == "x" else value + number if sign == "+" else value - number) % MODULUS


def results(first: int, operations: Sequence[tuple[str, int]]) -> list[int]:
    """What every operation gives."""
    found, value = [], first
    for sign, number in operations:
        value = apply(value, sign, number)
        found.append(value)
    return found


def examples(count: int, sizes: Sequence[int], seed: int, most: int | None = None) -> Iterator[Example]:
    """Items of chain, so many of each number of operations."""
    for m in sizes:
        for i in range(count):
            first, operations = draw(m, random.Random(f"{seed}/chain/{m}/{i}"))
            answer = results(first, operations)[-1]
            tags = {"subset": f"chain {m}", "category": "chain", "operations": m}
            text = prompt(first, operations)
            yield Example(f"chain/{m}/{i}", "", text, [str(answer)], most or 16 * m + 64, tags)


def draw(m: int, rng: random.Random) -> tuple[int, list[tuple[str, int]]]:
    """A first number and m operations."""
    first, signs = rng.randrange(MODULUS), [rng.choice(sorted(SIGNS)) for _ in range(m)]
    return first, [(sign, rng.randint(*SIGNS[sign])) for sign in signs]


def prompt(first: int, operations: Sequence[tuple[str, int]]) -> str:
    """What is asked of them."""
    listed = "\n".join(f"{j}. {sign} {number}" for j, (sign, number) in enumerate(operations, start=1))
    return PROMPT.format(first=first, operations=listed)


def solution(first: int, operations: Sequence[tuple[str, int]]) -> str:
    """The whole answer, as a model is taught it: a line per operation, then the box."""
    found = results(first, operations)
    return "\n".join([*map(str, found), f"\\boxed{{{found[-1]}}}"])


def score(prediction: str, answer: str) -> float:
    """1 if the last box holds the answer, as a whole number."""
    boxes = re.findall(r"\\boxed\{\s*([+-]?\d+)\s*\}", prediction)
    return float(bool(boxes) and int(boxes[-1]) == int(answer))
