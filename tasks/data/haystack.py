"""Long texts, and sentences hidden in them at a depth counted in tokens.

Origin: the public needle-in-a-haystack test of 2023; its texts are read in sorted order, which it leaves to the system.
Here:   every token whose text ends with a full stop ends a sentence, whatever the tokenizer; the original lists ids.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from methods.core.errors import UserError
from methods.core.reading import read_text
from tasks.data.files import ASSETS, hub_rows
from tasks.data.pins import PINNED
from tasks.data.sources import expand
from tasks.documents import prose
from tasks.tokens import Tokens

BUFFER = 200  # tokens that the original keeps free for instructions, question and answer
FAR = 0.02  # of the length: a needle that moves farther back to the end of a sentence is reported
ESSAYS = "baber/paul_graham_essays"
REAL = ASSETS / "needle-real" / "haystack.txt"


class Haystack:
    """A text to hide things in. where: its source, as it is printed."""

    def __init__(self, text: str, where: str):
        self.text, self.where = text, where
        self._ids: list[int] = []

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def ids(self, tokens: Tokens, n: int) -> Sequence[int]:
        """The first n tokens, by the first tokenizer that asks; the text is repeated if it is shorter."""
        characters = 8 * n
        while len(self._ids) < n:
            text = f"{self.text}\n" * -(-characters // len(self.text))
            self._ids = list(tokens.encode(text[:characters]))
            characters *= 2
        return self._ids[:n]


def read_haystack(data: str, revision: str = PINNED) -> Haystack:
    """`data`: "prose" (what every Python carries), "real" (bundled verses), "hub" (essays), or a path: a text file,
    or a folder of .txt and .md.

    Raises UserError if there is no text.
    """
    if data == "prose":
        return Haystack("\n".join([*prose("held_out"), *prose("train")]), "bundled prose")
    if data == "hub":
        rows, where = hub_rows("essays", ESSAYS, None, "train", revision)
        return Haystack("\n".join(row["text"] for row in rows), where)
    path = REAL if data == "real" else expand(data)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
    try:
        text = "\n".join(read_text(file).strip() for file in files)
    except UserError as error:
        raise UserError(f"task.data={data}: cannot be read as text in UTF-8 ({error})") from error
    if not text.strip():
        raise UserError(f"task.data={data}: no text; give a text file, or a folder with .txt or .md files")
    return Haystack(text, "bundled real text" if data == "real" else data)


@dataclass(frozen=True)
class Hidden:
    """moved: tokens that the farthest needle moved back to the end of a sentence."""

    text: str
    moved: int


def hide(
    tokens: Tokens, hay: Sequence[int], length: int, needles: Sequence[tuple[str, float]], buffer: int = BUFFER
) -> Hidden:
    """A text of at most `length` - `buffer` tokens with each needle (sentence, depth in per cent) at its depth.

    A needle stands between two newlines, right behind the last full stop before its depth, or in front of everything;
    at depth 100 it ends the text. Raises UserError if the room is too small or the text has no full stop.
    """
    between = [list(tokens.encode(f"\n{sentence}\n")) for sentence, _ in needles]
    text = list(tokens.encode(tokens.decode(hay[:length])))
    room = length - buffer - sum(map(len, between))
    if room < 1:
        raise UserError(
            f"needle: task.lengths={length} tokens have no room for text beside the needles and the question"
        )
    text = text[:room]
    ends = _Ends(tokens)
    offsets, moved = [], 0
    for _, depth in needles:
        wanted = len(text) if depth == 100 else int(len(text) * depth / 100)
        at = wanted
        while depth != 100 and at > 0 and not ends(text[at - 1]):
            at -= 1
        if at == 0 < wanted and not any(map(ends, text)):
            raise UserError("needle: the haystack has no full stop, so that every needle would be at depth 0")
        offsets.append(at)
        moved = max(moved, wanted - at)
    # from the end on, so that places stay true and needles of one place keep their order
    for at, i in sorted(((at, i) for i, at in enumerate(offsets)), reverse=True):
        text[at:at] = between[i]
    return Hidden(tokens.decode(text), moved)


class _Ends:
    """Whether a token ends a sentence: its text, white space aside, ends with a full stop."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self.known:
            self.known[token] = self.tokens.decode([token]).rstrip().endswith(".")
        return self.known[token]


def even_depths(n: int) -> list[float]:
    """n whole percentages from 0 to 100."""
    return [float(round(100 * i / (n - 1))) for i in range(n)]


def sigmoid_depths(n: int) -> list[float]:
    """n percentages, closer together near both ends, sorted."""
    even = [100 * i / (n - 1) for i in range(n)]
    return sorted(x if x in (0, 100) else round(100 / (1 + math.exp(0.1 * (x - 50))), 3) for x in even)
