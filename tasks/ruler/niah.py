"""RULER's eight needle tasks: magic numbers in noise, in essays, or among needles of the same sort."""

import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tasks.data.haystack import Haystack
from tasks.ruler.fitting import Sample
from tasks.ruler.templates import needle, noise, wording
from tasks.ruler.vocabulary import adjectives, nouns

SHUFFLE = 42  # every sample's needles come in the same permutation


@dataclass(frozen=True)
class Needles:
    """keys, values, queries: how many.  haystack: "noise", "essay" or "needle".  key, value: what they are made of."""

    keys: int
    values: int
    queries: int
    haystack: str
    key: str = "words"
    value: str = "numbers"


NIAH = {
    "niah_single_1": Needles(1, 1, 1, "noise"),
    "niah_single_2": Needles(1, 1, 1, "essay"),
    "niah_single_3": Needles(1, 1, 1, "essay", value="uuids"),
    "niah_multikey_1": Needles(4, 1, 1, "essay"),
    "niah_multikey_2": Needles(1, 1, 1, "needle"),
    "niah_multikey_3": Needles(1, 1, 1, "needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles(1, 4, 1, "essay"),
    "niah_multiquery": Needles(4, 1, 4, "essay"),
}
DEPTHS = [round(100 * i / 39) for i in range(40)]


def item(rng: random.Random, sort: str) -> str:
    """A key or a value: an adjective and a noun, seven digits, or a uuid."""
    if sort == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if sort == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


class Essay:
    """A text as words, cut into sentences. splitter: text to sentences."""

    def __init__(self, haystack: Haystack, splitter: Callable[[str], list[str]]):
        self.haystack, self.splitter = haystack, splitter
        self.cut: dict[int, list[str]] = {}

    @cached_property
    def words(self) -> list[str]:
        """All words of the haystack, in order."""
        return self.haystack.text.split()

    def sentences(self, n: int) -> list[str]:
        """Those of the first n words; the text is repeated if it is shorter."""
        if n not in self.cut:
            text = " ".join((self.words * -(-n // len(self.words)))[:n])
            self.cut = {n: self.splitter(text)}  # samples of one length share it
        return self.cut[n]


def make(rng: random.Random, spec: Needles, units: int, essay: Essay | None) -> Sample:
    """One sample with `units` words of essay, or lines of noise or of other needles."""
    keys = [item(rng, spec.key) for _ in range(spec.keys)]
    values = [[item(rng, spec.value) for _ in range(spec.values)] for _ in keys]
    sentence = needle()
    lines = [
        sentence.format(type_needle_v=spec.value, key=key, value=value)
        for key, values_of_key in zip(keys, values)
        for value in values_of_key
    ]
    random.Random(SHUFFLE).shuffle(lines)
    if spec.haystack == "essay":
        assert essay is not None
        text = _in_essay(rng, essay.sentences(units), lines)
    else:
        if spec.haystack == "noise":
            hay = [noise()] * units
        else:
            hay = [
                sentence.format(type_needle_v=spec.value, key=item(rng, spec.key), value=item(rng, spec.value))
                for _ in range(units)
            ]
        for at, line in zip(sorted(rng.sample(range(units), len(lines)), reverse=True), lines):
            hay.insert(at, line)
        text = "\n".join(hay)
    asked = rng.sample(range(spec.keys), spec.queries)
    names = [keys[i] for i in asked]
    query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    context, question, prefix = fill(text, query, spec)
    return Sample(context, question, prefix, [value for i in asked for value in values[i]])


def _in_essay(rng: random.Random, sentences: list[str], lines: list[str]) -> str:
    cuts = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(lines)))
    parts, last = [], 0
    for cut, line in zip(cuts, lines):
        parts += [*sentences[last:cut], line]
        last = cut
    return " ".join(parts + sentences[last:])


def fill(text: str, query: str, spec: Needles) -> tuple[str, str, str]:
    """Context, question and answer prefix; in the singular where one value is asked for."""
    words = wording("niah")
    template, prefix, sort = words.template, words.prefix, spec.value
    if spec.queries * spec.values == 1:
        template, prefix, sort = _singular(template), _singular(prefix), sort.removesuffix("s")
    before, after = template.split("{context}")
    filled = {"type_needle_v": sort, "query": query}
    return before.format(**filled) + text + "\n", after.removeprefix("\n").format(**filled), prefix.format(**filled)


def _singular(text: str) -> str:
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(many, one)
    return text


def punkt() -> Callable[[str], list[str]] | None:
    """nltk's sentence splitter, which RULER uses; None if nltk or its data are not installed."""
    try:
        from nltk import data, sent_tokenize

        data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return None
    return sent_tokenize


_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")


def by_marks(text: str) -> list[str]:
    """Sentences by their punctuation, where punkt is not to be had."""
    return _END.split(text)
