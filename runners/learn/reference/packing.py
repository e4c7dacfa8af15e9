"""Rows of tokens to train on: documents packed to an exact length, each row addressed by (seed, step, row)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from runners.learn.reference.long_answers import LONG
from tasks.documents import KINDS as SHORT
from tasks.documents import Document, Pool, prose, sentences
from tasks.documents.pools import pick

KINDS = SHORT | LONG
MIXTURE = {
    "pairs": 0.13, "table": 0.06, "facts": 0.16, "needle": 0.11, "chains": 0.11, "bridge": 0.10, "findings": 0.08,
    "labels": 0.08, "passages": 0.09, "code": 0.08, "copies": 0.02, "prose": 0.12,
}  # fmt: skip
PROSE_WEIGHT = 0.5  # of a token's loss; an answer's token, EOS included, counts 1
SHORTEST = 64  # tokens; a smaller rest of a row is filled with prose


@dataclass(frozen=True)
class DataMix:
    """What rows are made of.

    mixture: share of each kind of document.  context: least and greatest share of a document before its questions.
    text_weight: of the loss of contexts and questions.  knobs: by kind, settings that are not drawn at random.
    """

    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))
    context: tuple[float, float] = (0.5, 0.9)
    text_weight: float = 0.2
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Row:
    """ids [L] int64; weights [L] float32, the weight of predicting the token at the same place."""

    ids: np.ndarray
    weights: np.ndarray


class Packer:
    """Packs documents of the training pool; the same (seed, step, row, length) gives the same row for ever."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self._prose, self._sentences = prose("train"), sentences("train")
        self._chars: dict[str, float] = {}

    def row(self, step: int, row: int, length: int, mix: DataMix | None = None) -> Row:
        """One document of nearly the whole length, or several shorter ones; `length` tokens exactly."""
        mix = mix or DataMix()
        kinds, edges = list(mix.mixture), np.cumsum(list(mix.mixture.values()))
        rng = np.random.default_rng([self.seed, step, row])
        whole = rng.random() < 0.6
        ids: list[int] = []
        weights: list[float] = []
        while (room := length - len(ids)) > 0:
            kind = kinds[int(np.searchsorted(edges, rng.random() * edges[-1]))]
            wanted = room if whole else max(SHORTEST, int(room * (0.2 + 0.4 * rng.random())))
            if room < SHORTEST or kind == "prose":
                tokens = self._prose_tokens(rng, min(room, 256))
            else:
                tokens = self._document_tokens(rng, kind, min(wanted, room), mix)
            ids += tokens[0]
            weights += tokens[1]
        return Row(np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32))

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _document_tokens(
        self, rng: np.random.Generator, kind: str, room: int, mix: DataMix
    ) -> tuple[list[int], list[float]]:
        least, most = mix.context
        for attempt in range(4):
            share = (least + (most - least) * rng.random()) * 0.7**attempt
            characters = int(room * share * self._chars_per_token(kind))
            document = make_training_document(rng, kind, characters, self._sentences, mix.knobs)
            opening = document.opening if rng.random() < 0.8 else document.context
            ids = [self.tokenizer.bos_token_id, *self.encode(opening)]
            weights = [mix.text_weight] * len(ids)
            answered = not document.turns
            for turn in document.turns:
                question, answer = self.encode(f"\n\n{turn.question}"), self.encode(turn.answer)
                if len(ids) + len(question) + len(answer) + 1 > room:
                    break
                ids += [*question, *answer, self.tokenizer.eos_token_id]
                weights += [mix.text_weight] * len(question) + [1.0] * (len(answer) + 1)
                answered = True
            if answered and len(ids) <= room:
                return ids, weights
        return self._prose_tokens(rng, room)

    def _prose_tokens(self, rng: np.random.Generator, room: int) -> tuple[list[int], list[float]]:
        ids = [self.tokenizer.bos_token_id]
        at = int(rng.integers(len(self._prose)))
        while len(ids) < room:
            ids += self.encode(self._prose[at % len(self._prose)] + "\n\n")
            at += 1
        return ids[:room], [PROSE_WEIGHT] * room

    def _chars_per_token(self, kind: str) -> float:
        if kind not in self._chars:
            texts = [
                make_training_document(np.random.default_rng([self.seed, i]), kind, 800, self._sentences, {}).context
                for i in range(8)
            ]
            self._chars[kind] = sum(map(len, texts)) / sum(len(self.encode(text)) for text in texts)
        return self._chars[kind]


def make_training_document(
    rng: np.random.Generator, kind: str, size: int, filler: tuple[str, ...], fixed: dict[str, dict[str, Any]]
) -> Document:
    """A document of the training pool with random settings and as many questions as could be of use."""
    pool = Pool(rng, "train", filler if rng.random() < 0.7 else None)
    size, turns = max(size, 40), 48
    knobs: dict[str, Any] = {}
    if kind in ("pairs", "table", "facts", "needle"):
        draw = rng.random()
        knobs["style"] = "prefix" if draw < 0.55 else "restate" if draw < 0.9 else "bare"
    if kind == "facts":
        knobs |= {"filler": 0.9 * rng.random(), "most": 1 + int(rng.integers(4))}
    elif kind == "needle":
        knobs["needles"] = 1 + int(rng.integers(max(1, min(16, size // 120))))
    elif kind == "chains":
        knobs |= {"links": 2 + int(rng.integers(max(1, min(4, size // 100)))), "filler": 0.8 * rng.random()}
    elif kind == "findings":
        knobs["points"] = 1 + int(rng.integers(max(1, min(5, size // 150))))
    elif kind == "labels":
        knobs |= {"classes": 2 + int(rng.integers(5)), "named": bool(rng.random() < 0.65)}
    elif kind == "passages":
        knobs["marked"] = bool(rng.random() < 0.6)
    return KINDS[kind](pool, size, turns, **(knobs | fixed.get(kind, {})))


def pick_length(rng: np.random.Generator, lengths: list[int]) -> int:
    """One of the lengths of a stage."""
    return pick(rng, lengths)
