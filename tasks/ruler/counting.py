"""RULER's two counting tasks: the common words of a numbered list (cwe), the frequent words of a coded text (fwe)."""

import random
import string
from collections.abc import Callable
from functools import cache

from methods.core.errors import UserError
from tasks.ruler.fitting import Sample
from tasks.ruler.templates import Wording, wording
from tasks.ruler.vocabulary import all_words

SHUFFLE = 42
COMMON = 10
SHORT = 4096  # below this length words are repeated less often
ZETA_2 = 1.644934


def split(words: Wording, text: str) -> tuple[str, str, str]:
    """Context, question and answer prefix of a filled template."""
    prompt = words.template.format(context=text, query="")
    at = prompt.rindex("Question:")
    return prompt[:at], prompt[at:], words.prefix


@cache
def vocabulary() -> tuple[str, ...]:
    """All words of wonderwords in one shuffled order."""
    words = list(all_words())
    random.Random(SHUFFLE).shuffle(words)
    return tuple(words)


def common_words(rng: random.Random, n: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A numbered list in which ten of n words come `often` and the others `seldom`; and the ten."""
    drawn = rng.sample(vocabulary(), n)
    words = drawn[:COMMON] * often + drawn[COMMON:] * seldom
    random.Random(SHUFFLE).shuffle(words)
    return numbered(words), drawn[:COMMON]


def numbered(words: list[str]) -> str:
    """Words as a numbered list on one line."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def make_cwe(rng: random.Random, units: int, length: int) -> Sample:
    """A solved short list, then a list of `units` distinct words. Raises UserError if there are not so many words."""
    if units > len(vocabulary()):
        raise UserError(
            f"ruler: cwe at {length} tokens needs {units} distinct words; wonderwords has {len(vocabulary())}"
        )
    words = wording("cwe")
    n, often, seldom = (20, 3, 1) if length < SHORT else (40, 10, 3)
    text, ten = common_words(rng, n, often, seldom)
    solved = f"{''.join(split(words, text))} {numbered(ten)}\n"
    text, ten = common_words(rng, units, *((6, 1) if length < SHORT else (30, 3)))
    context, question, prefix = split(words, text)
    return Sample(solved + context, question, prefix, ten)


def make_fwe(rng: random.Random, n: int, length: int) -> Sample:
    """n words drawn from a coded vocabulary whose frequencies fall with the square of the rank; dots lead.

    Raises UserError if the ranks asked for are tied.
    """
    size = (length - wording("fwe").max_new_tokens) // 50
    drawn: dict[str, None] = {}
    while len(drawn) < size:
        drawn["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded = sorted(drawn)
    random.Random(SHUFFLE).shuffle(coded)
    coded[0] = "..."
    counts = [int(n * rank**-2.0 / ZETA_2) for rank in range(1, size + 1)]
    if len(counts) < 5 or not counts[1] > counts[2] > counts[3] > counts[4]:
        raise UserError(f"ruler: fwe at {length} tokens has tied words; give a larger task.lengths")
    text = [word for word, count in zip(coded, counts) for _ in range(count)]
    random.Random(SHUFFLE).shuffle(text)
    return Sample(*split(wording("fwe"), " ".join(text)), coded[1:4])


def most_coded_words(cost: Callable[[int], int], length: int) -> int:
    """The number of words at which RULER's own loop stops: one step before the text fills the length."""
    room = length - wording("fwe").max_new_tokens
    n = room // 6
    while cost(n) < length:
        n += room // 32
    return n - room // 32
