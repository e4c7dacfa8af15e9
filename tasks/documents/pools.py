"""Names and values that documents are made of, in two pools that share no item.

An invented word belongs to a pool by a checksum of its letters, so membership needs no stored list, and the two pools
are built from the same syllables: a word of the held-out pool is new to a trained model, its pieces are not.
"""

import zlib
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")
Split = Literal["train", "held_out"]


def words(text: str) -> tuple[str, ...]:
    """The words of a text, or the phrases of one that has bars between them."""
    return tuple(text.split("|" if "|" in text else None))


_ONSETS = words("b br d dr f g gr h j k kl l m n p pl r s st t tr v z")
_STARTS = [onset + vowel for onset in _ONSETS for vowel in "aeiou"]
_ENDS = [onset + vowel + coda for onset in "bdgklmnrstv" for vowel in "aeiou" for coda in ("n", "s", "k", "")]
HELD_OUT_SHARE = 8  # one word in so many is held out


def split_of(item: str) -> Split:
    """The only pool in which the invented word or number `item` may appear, whatever its case."""
    return "held_out" if zlib.crc32(item.lower().encode()) % HELD_OUT_SHARE == 0 else "train"


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, each as likely as the others."""
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """`items` in a random order."""
    return [items[int(i)] for i in rng.permutation(len(items))]


class Pool:
    """Draws the names and values of one document; no two draws of one pool object give the same word.

    prose: natural sentences to use as filler beside the generated ones; None uses generated filler only.
    """

    def __init__(self, rng: np.random.Generator, split: Split = "train", prose: Sequence[str] | None = None):
        self.rng, self.split, self.prose = rng, split, prose
        self._used: set[str] = set()

    def _fresh(self, draw_item) -> str:
        while True:
            item = draw_item()
            if item not in self._used and split_of(item) == self.split:
                self._used.add(item)
                return item

    def word(self) -> str:
        """An invented word of two syllables, seldom three, in lower case."""

        def draw_word() -> str:
            middle = pick(self.rng, _ENDS) if self.rng.random() < 0.2 else ""
            return pick(self.rng, _STARTS) + middle + pick(self.rng, _ENDS)

        return self._fresh(draw_word)

    def name(self) -> str:
        """An invented word with a capital."""
        return self.word().capitalize()

    def number(self, low: int = 3, high: int = 6) -> str:
        """A decimal number of `low` to `high` digits without a leading zero; longer ones when those are used up."""
        digits = int(self.rng.integers(low, high + 1))
        for _ in range(1000):
            item = str(int(self.rng.integers(10 ** (digits - 1), 10**digits)))
            if item not in self._used and split_of(item) == self.split:
                self._used.add(item)
                return item
        return self.number(high + 1, high + 1)  # a long document has used the short ones up

    def value(self) -> str:
        """A word or a number of two to four digits: as short as the answers of most question sets."""
        return self.number(2, 4) if self.rng.random() < 0.4 else self.word()

    def filler(self) -> str:
        """One sentence that says nothing about any name."""
        if self.prose and self.rng.random() < 0.5:
            return pick(self.rng, self.prose)
        return filler_sentence(self.rng)


_NOUNS = words(
    "bridge road garden window river market kitchen ladder lamp table basket tower boat field fence wagon mill roof "
    "cellar barn stove bell rope cloth stone path orchard well gate wall clock chair boot coat kettle drum"
)
_ADJECTIVES = words("old small quiet grey heavy narrow wooden broken bright dusty cold empty clean low wide plain")
_VERBS = words("stood waited leaned creaked faded dried moved stayed cooled turned rested hung lay remained")
_PLACES = words(
    "near the water|behind the house|under the trees|by the door|along the street|at the corner|below the hill|"
    "in the shade|beside the road|in the yard|over the valley|on the slope"
)
_TIMES = words(
    "in the morning|after the rain|all winter|until noon|for many years|every autumn|before dawn|most of the day|"
    "late in the week|during the storm|at night|that summer"
)


def filler_sentence(rng: np.random.Generator) -> str:
    """A generated sentence about ordinary things; the same for every Python version."""
    noun, other = f"{pick(rng, _ADJECTIVES)} {pick(rng, _NOUNS)}", pick(rng, _NOUNS)
    verb, place, time = pick(rng, _VERBS), pick(rng, _PLACES), pick(rng, _TIMES)
    forms = (
        f"The {noun} {verb} {place} {time}.",
        f"{time.capitalize()} the {noun} {verb} {place}.",
        f"A {noun} and a {other} {verb} {place}.",
        f"People say that the {noun} {verb} {place} {time}.",
        f"Nobody noticed the {noun}, which {verb} {place}.",
    )
    return pick(rng, forms)
