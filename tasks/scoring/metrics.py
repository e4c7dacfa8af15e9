"""LongBench's metrics: pure functions of a prediction and one reference, each in [0, 1].

Paper: Bai et al. 2024, LongBench, arXiv:2308.14508, section 3.
Here:  ROUGE-L is that of the package `rouge` 1.0.1, written out so that nothing has to be installed, and code
       similarity is difflib's ratio: with python-Levenshtein installed, the usual library finds other matching
       blocks and gives code 1 to 3 points more.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

VERSION = "1"  # goes into every record; raise it when a score could change

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# LongBench's list of full-width marks, first and last of each run; it lacks U+201A, U+300A and U+FF0E, and so does this
_WIDE_RUNS = (
    "–—",
    "‘’",
    "‛‟",
    "…‧",
    "、〃",
    "》】",
    "〔〟",
    "〰〰",
    "〾〿",
    "﹏﹏",
    "！－",
    "／／",
    "：＠",
    "［｀",
    "｛､",
)
_WIDE = "".join(chr(code) for run in _WIDE_RUNS for code in range(ord(run[0]), ord(run[1]) + 1))
_ZH_PUNCTUATION = str.maketrans("", "", string.punctuation + _WIDE)


def f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of words, without case, ASCII punctuation and English articles."""
    return bag_f1(_words(prediction), _words(reference))


def f1_zh(prediction: str, reference: str) -> float:
    """F1 of the two bags of jieba's words, without case, punctuation and white space."""
    return bag_f1(_zh_words(prediction), _zh_words(reference))


def bag_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words; 0 if they share none."""
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    # punctuation goes before articles: "a." is an article, and "the-end" is one word
    text = text.lower().translate(_PUNCTUATION)
    return _ARTICLE.sub(" ", text).split()


def _zh_words(text: str) -> list[str]:
    tokens = ("".join(token.lower().translate(_ZH_PUNCTUATION).split()) for token in _cut_zh(text))
    return [token for token in tokens if token]


def _cut_zh(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel("WARNING")  # it announces its dictionary otherwise
    return jieba.lcut(text)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L over sentences and distinct words; 0 if either text is empty or only dots.

    A sentence ends at any full stop, also inside a number. A word of the reference counts as found if it lies on the
    longest common subsequence of any reference sentence with any predicted one.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    for sentence in predicted:
        matcher = _SubsequenceMatcher(sentence)
        for other in expected:
            common |= matcher.common(other)
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)  # rouge 1.0.1's guard against 0 / 0


def rouge_l_zh(prediction: str, reference: str) -> float:
    """ROUGE-L of the two texts with a blank between jieba's words."""
    return rouge_l(" ".join(_cut_zh(prediction)), " ".join(_cut_zh(reference)))


def _sentences(text: str) -> list[list[str]]:
    # split(" "), not split(): a piece of white space only is one empty word
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


class _SubsequenceMatcher:
    """Words on the longest common subsequence of `words` with other sentences.

    A row of the table of lengths is one integer (Hyyrö 2004, bit-vector algorithms for the longest common
    subsequence): bit j is 0 where the length grows from column j to j + 1. A long summary then takes milliseconds.
    """

    def __init__(self, words: list[str]):
        self.words = words
        self.full = (1 << len(words)) - 1
        self.positions: dict[str, int] = {}
        for j, word in enumerate(words):
            self.positions[word] = self.positions.get(word, 0) | 1 << j

    def common(self, other: list[str]) -> set[str]:
        """Traced back from the end; on a mismatch `other` gives way only if that loses strictly less."""
        if self.positions.keys().isdisjoint(other):
            return set()
        rows = [self.full]
        for word in other:
            row = rows[-1]
            hit = row & self.positions.get(word, 0)
            rows.append(((row + hit) | (row - hit)) & self.full)
        words = set()
        i, j = len(other), len(self.words)
        while i and j:
            if other[i - 1] == self.words[j - 1]:
                i, j = i - 1, j - 1
                words.add(other[i])
            elif _length(rows[i - 1], j) > _length(rows[i], j - 1):
                i -= 1
            else:
                j -= 1
        return words


def _length(row: int, j: int) -> int:
    """Zeros among the lowest j bits: the length of the subsequence up to column j."""
    return j - (row & ((1 << j) - 1)).bit_count()


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the reference is one of them.

    A class that is a part of the reference's name is not held against it, except that LongBench drops these while
    walking the same list, so that the one after a dropped one is passed over.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the reference; 0 if there are none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """As `count`, against the number in the reference, "Paragraph 12" or "段落12"; ValueError if it has none."""
    number = PARAGRAPH.search(reference)
    if number is None:
        raise ValueError(f"reference {reference!r} names no paragraph")
    return count(prediction, number[1])


PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")


def edit_sim(prediction: str, reference: str) -> float:
    """difflib's similarity, in hundredths, of the reference and the prediction's first line that looks like code.

    That line has no backtick, no `#` and no `//`; a prediction without such a line counts as empty.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    # the order matters: difflib's ratio is not symmetric
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def contains(prediction: str, reference: str) -> float:
    """1 if the prediction holds the reference, whatever their case and white space, and not as a part of a longer word
    or figure: "1,200" is not in "31,200" nor "1,200.5"; of a split's own, no metric of LongBench."""
    text, wanted = (" ".join(one.lower().split()) for one in (prediction, reference))
    before, after = r"(?<![\w.,])" if wanted[:1].isdigit() else r"(?<!\w)", r"(?!\w|[.,]\d)"
    return float(bool(wanted) and re.search(f"{before}{re.escape(wanted)}{after}", text) is not None)


METRICS: dict[str, Callable[..., float]] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "class": classification,
    "count": count,
    "retrieval": retrieval,
    "edit_sim": edit_sim,
    "contains": contains,
}
NEEDS_JIEBA = ("f1_zh", "rouge_l_zh")


def first_line(prediction: str) -> str:
    """The first line that is not empty; a line of blanks is not empty."""
    return prediction.lstrip("\n").split("\n")[0]


def best_score(metric: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """The highest score of a metric of METRICS over the references. `classes`: all labels, for "class" only."""
    extra: dict[str, Any] = {"classes": classes or ()} if metric == "class" else {}
    return max((METRICS[metric](prediction, answer, **extra) for answer in answers), default=0.0)
