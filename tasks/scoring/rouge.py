"""ROUGE as its two Python packages compute it. They differ in tokens, counting and stems: never compare across them."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from typing import Any

from tasks.ruler import niah
from tasks.scoring.metrics import rouge_l

PACKAGES = ("rouge-score", "rouge")
WHOLE, BY_SENTENCE = "ROUGE-L", "ROUGE-Lsum"


def described(package: str, stemmed: bool = True) -> str:
    """The package, its version and stemming."""
    if package == "rouge-score":
        return f"rouge-score {metadata.version('rouge-score')}, {'' if stemmed else 'not '}stemmed"
    return "rouge 1.0.1 written out, not stemmed"


def scores(package: str, prediction: str, reference: str) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L, each in [0, 1]; 0 where either text is empty.

    Of rouge-score also ROUGE-Lsum: ROUGE-L takes a text as one sequence, ROUGE-Lsum every sentence by itself. Tables on
    CNN/DailyMail mostly report the second under the name of the first.
    """
    if package == "rouge-score":
        rouge_scores = dict(_scorer(("rouge1", "rouge2", "rougeL"), True).score(reference, prediction))
        rouge_scores |= _scorer(("rougeLsum",), True).score(in_lines(reference), in_lines(prediction))
        return {f"ROUGE-{name.removeprefix('rouge')}": one.fmeasure for name, one in rouge_scores.items()}
    return {
        "ROUGE-1": overlap(prediction, reference, 1),
        "ROUGE-2": overlap(prediction, reference, 2),
        "ROUGE-L": rouge_l(prediction, reference),
    }


@cache
def splitter() -> tuple[str, Callable[[str], list[str]]]:
    """The name and the function that cuts texts into sentences: nltk's punkt, as in the papers' code, else by marks."""
    tokenizer = niah.punkt()
    return ("punkt", tokenizer) if tokenizer else ("marks", niah.by_marks)


def in_lines(text: str) -> str:
    """The text with one sentence per line; lines that it has stay apart."""
    _, split = splitter()
    return "\n".join(sentence for line in text.split("\n") for sentence in split(line.strip()) if sentence)


def lsum(prediction: str, references: Sequence[str]) -> float:
    """Best F of ROUGE-Lsum as HF evaluate has it by default: rouge-score, words not stemmed, every line a sentence."""
    rouge_scores = _scorer(("rougeLsum",), False).score_multi(references, prediction)
    return float(rouge_scores["rougeLsum"].fmeasure)


def overlap(prediction: str, reference: str, n: int) -> float:
    """F of the sets of n-grams, over the words between blanks of all pieces between full stops joined."""
    predicted, expected = _ngrams(prediction, n), _ngrams(reference, n)
    if not predicted or not expected:
        return 0.0
    common = len(predicted & expected)
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall + 1e-8)  # rouge 1.0.1's guard against 0 / 0


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = [word for piece in text.split(".") for word in piece.split()]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@cache
def _scorer(names: tuple[str, ...], stemmed: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), use_stemmer=stemmed)
