"""passcode: a code that stands in the answer's own beginning, far behind when it is asked for.

The answer begins with text that is given and fed token by token, as though the model had written it: sentences, one
that says a code of five digits, more sentences, and the words that ask for it. What follows is the model's own. So the
code is a slot of the decoding, which no pin of the prompt protects.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from tasks.base import Example
from tasks.documents.prose import sentences
from tasks.tokens import Tokens

PROMPT = "Write about computers and their languages, and say what the passcode was when you are done."
SAID = " By the way, the passcode is {code}."
ASKED = "\n\nThat is all there is to say. The passcode was"
NEW_TOKENS = 12
CONTROLS = 2  # per distance, without the sentence: what is right by chance


def examples(count: int, distances: Sequence[int], before: int, seed: int, tokens: Tokens) -> Iterator[Example]:
    """Items of passcode, so many of each distance, and a few controls."""
    for distance in distances:
        for i in range(count + CONTROLS):
            rng = random.Random(f"{seed}/passcode/{distance}/{i}")
            code, control = f"{rng.randrange(10**5):05d}", i >= count
            said = "" if control else SAID.format(code=code)
            begins = filler(before, rng, tokens) + said + filler(distance, rng, tokens) + ASKED
            kind = "passcode without" if control else "passcode"
            tags = {"subset": f"{kind} {distance}", "category": kind, "distance": distance}
            yield Example(
                f"passcode/{distance}/{f'without/{i - count}' if control else i}", "", PROMPT, [code], NEW_TOKENS,
                {**tags, **({"control": True} if control else {})}, begins=begins,
            )  # fmt: skip


def filler(length: int, rng: random.Random, tokens: Tokens) -> str:
    """Sentences of about so many tokens, and no more; each begins with a blank."""
    pool, text, left = sentences("held_out"), "", length
    while True:
        more = f" {rng.choice(pool)}"
        left -= tokens.count(more)
        if left < 0:
            return text
        text += more


def score(prediction: str, answer: str) -> float:
    """1 if the first run of digits is the code."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found[0] == answer)
