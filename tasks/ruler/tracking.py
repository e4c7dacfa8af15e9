"""RULER's variable tracking: a chain of assignments in noise; every variable with the first one's value is asked."""

import random
import string
from collections.abc import Callable
from itertools import pairwise

from tasks.ruler.fitting import Sample, most_units
from tasks.ruler.templates import noise, wording

HOPS = 4
EXAMPLE_TOKENS = 500  # of the worked example before the task
EXAMPLE_VALUE = "12345"


def names(rng: random.Random, letters: int) -> list[str]:
    """Distinct variables of so many capitals."""
    variables: dict[str, None] = {}
    while len(variables) < HOPS + 1:
        variables["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(variables)


def track(variables: list[str], value: str, units: int, positions: list[int]) -> Sample:
    """The task's text with the chain's lines at sorted places among `units` groups of noise."""
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    lines = [noise()] * units
    for i, (position, line) in enumerate(zip(positions, chain)):
        lines.insert(position + i, line)
    words = wording("vt")
    before, after = words.template.split("{context}")
    filled = {"query": value, "num_v": len(variables)}
    text = "\n".join(lines).replace(". \n", ".\n")
    return Sample(
        f"{before}{text}\n", after.removeprefix("\n").format(**filled), words.prefix.format(**filled), variables
    )


class Example:
    """The worked example: its noise and the places of its lines are drawn once, its names and value per sample."""

    def __init__(self, seed: str, count: Callable[[str], int]):
        rng = random.Random(seed)

        def cost(units: int) -> int:
            return (
                count(self._text(names(rng, 3), EXAMPLE_VALUE, units, line_positions(rng, units)))
                + wording("vt").max_new_tokens
            )

        self.units = most_units(cost, EXAMPLE_TOKENS, step=5, estimate_from=5)
        self.positions = line_positions(rng, self.units)

    def text(self, rng: random.Random) -> str:
        """The worked example with names and a value of this sample's."""
        return self._text(names(rng, 3), str(rng.randrange(10_000, 99_999)), self.units, self.positions) + "\n\n"

    def _text(self, variables: list[str], value: str, units: int, at: list[int]) -> str:
        return track(variables, value, units, at).prompt + " ".join(variables)


def line_positions(rng: random.Random, units: int) -> list[int]:
    """Where the lines of a chain stand among `units` groups of noise, sorted."""
    return sorted(rng.sample(range(units), HOPS + 1))


def make(rng: random.Random, units: int, example: Example) -> Sample:
    """One sample: the worked example, then the task."""
    before = example.text(rng)
    sample = track(names(rng, 5), str(rng.randrange(10_000, 99_999)), units, line_positions(rng, units))
    return Sample(before + sample.context, sample.question, sample.prefix, sample.outputs)
