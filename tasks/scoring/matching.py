"""Scores by matching strings: RULER's, InfiniteBench's and the needle test's; pure functions, each in [0, 1].

Papers: Hsieh et al. 2024, RULER, arXiv:2404.06654; Zhang et al. 2024, InfiniteBench, arXiv:2402.13718.
"""

import re
from collections.abc import Callable, Sequence

from tasks.scoring.metrics import bag_f1

VERSION = "1"  # goes into every record; raise it when a score could change

_CONTROL = re.compile(r"[\x00-\x1f]")
_MARKS = re.compile(r"[\n:\"'.,?!{}]")
LETTERS = ("A", "B", "C", "D")
_CUES = ("answer is:", "answer:", "answer is", "option is")
_NO_CUE = re.compile(r"[\n\"'.,?!{}]")


def printable(prediction: str) -> str:
    """RULER's clean-up: every ASCII control character becomes a newline, white space goes at both ends."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction holds, whatever their case."""
    text = printable(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction holds any of the references, whatever their case."""
    text = printable(prediction).lower()
    return float(any(reference.lower() in text for reference in references))


def contains(prediction: str, references: Sequence[str]) -> float:
    """Share of the phrases found, whatever their case and white space."""
    text = " ".join(prediction.lower().split())
    return sum(" ".join(phrase.lower().split()) in text for phrase in references) / len(references)


def first_number(prediction: str, references: Sequence[str]) -> float:
    """1 if the first run of digits is a reference, compared as strings: 012 is not 12."""
    number = re.search(r"[0-9]+", prediction)
    return float(number is not None and number[0] in references)


def is_a_word(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is one of the prediction's words, most punctuation aside; hyphens stay inside words."""
    words = set(_MARKS.sub(" ", prediction).split())
    return float(any(reference in words for reference in references))


def chosen_letter(prediction: str) -> str | None:
    """The letter that an answer begins with, else the one behind a cue, else the first that is a word; None if none.

    As the benchmarks have it, "Answer: B" begins with A; behind a cue and as a word lower case counts as well, so that
    an article is an A.
    """
    text = printable(prediction)
    if text[:1] in LETTERS:
        return text[0]
    text = _NO_CUE.sub(" ", text)
    for cue in _CUES:
        after = text.lower().partition(cue)[2].strip()[:1].upper()
        if after in LETTERS:
            return after
    return next((word.upper() for word in text.split() if word.upper() in LETTERS), None)


def rouge_1(prediction: str, references: Sequence[str]) -> float:
    """Best ROUGE-1 F of rouge-score with its stemmer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    return max(scorer.score(reference, prediction)["rouge1"].fmeasure for reference in references)


def rouge_1_of_sets(prediction: str, references: Sequence[str]) -> float:
    """Best ROUGE-1 F of the package `rouge` 1.0.1: distinct words between blanks, full stops dropped."""
    words = _distinct(prediction)
    return max(bag_f1(words, _distinct(reference)) for reference in references)


def _distinct(text: str) -> list[str]:
    return list(dict.fromkeys(word for sentence in text.split(".") if sentence for word in sentence.split()))


MATCHING: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": string_match_all,
    "part": string_match_part,
    "contains": contains,
    "first_number": first_number,
    "word": is_a_word,
    "rouge1": rouge_1,
    "rouge_pkg": rouge_1_of_sets,
}
