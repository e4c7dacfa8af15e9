"""What a model recalls: greedy exact match on held-out documents, by kind and length.

A greedy answer equals the reference, its end included, exactly when every token of the reference is the most likely
one after those before it; so one forward pass over context, questions and answers measures without generating.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from runners.learn.reference.long_answers import LONG
from tasks.documents import KINDS, Document, Pool

# ability: kind and settings, as the card and the curves show them
ABILITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("pairs", {}),
    "key-value": ("table", {}),
    "facts": ("facts", {"most": 1}),
    "facts, whole answer": ("facts", {"most": 1, "style": "restate"}),
    "facts, bare answer": ("facts", {"most": 1, "style": "bare"}),
    "facts, 3 per name": ("facts", {"most": 3}),
    "needle": ("needle", {}),
    "needle, 16 keys": ("needle", {"needles": 16}),
    "chains of 3": ("chains", {"links": 3, "restate": False}),
    "chains of 5": ("chains", {"links": 5, "restate": False}),
    "two passages": ("bridge", {"restate": False}),
    "summary": ("findings", {}),
    "labels": ("labels", {}),
    "labels, unnamed": ("labels", {"named": False}),
    "paragraph": ("entries", {}),
    "paragraph, unmarked": ("passages", {"marked": False}),
    "code": ("code", {}),
}
#: of a model that is trained for long answers
LONG_ABILITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "walks of 10": ("walks", {"steps": 10}),
    "walks of 30": ("walks", {"steps": 30}),
    "sums of 8": ("sums", {"operations": 8}),
    "sums of 32": ("sums", {"operations": 32}),
    "codes": ("codes", {}),
}


def held_out_document(ability: str, characters: int, turns: int, address: list[int]) -> Document:
    """A document of the held-out pool; the same `address` gives the same document."""
    kind, knobs = (ABILITIES | LONG_ABILITIES)[ability]
    return (KINDS | LONG)[kind](Pool(np.random.default_rng(address), "held_out"), characters, turns, **knobs)


def fitted_document(tokenizer, ability: str, length: int, turns: int, address: list[int]) -> Document:
    """A held-out document whose opening has close to, and never more than, `length` - 80 - 40 x turns tokens."""
    room = length - 80 - 40 * turns
    characters = 3 * room
    for _ in range(12):
        document = held_out_document(ability, characters, turns, address)
        n = len(tokenizer(document.opening).input_ids)
        if 0.93 * room <= n <= room:
            break
        characters = max(40, int(characters * 0.97 * room / n))
    return document


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    documents: int,
    turns: int,
    seed: int,
    abilities: Sequence[str] = tuple(ABILITIES),
) -> dict[str, tuple[int, int]]:
    """By ability, (questions answered exactly and ended, questions asked), in documents of `length` tokens."""
    model.eval()
    counts = {}
    for ability in abilities:
        right = asked = 0
        for i in range(documents):
            document = fitted_document(tokenizer, ability, length, turns, [seed, 1, i])
            ids, spans = _encode(tokenizer, document, turns)
            hits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].argmax(-1).cpu()
            asked += len(spans)
            right += sum(hits[a - 1 : b - 1].tolist() == ids[a:b] for a, b in spans)
        counts[ability] = (right, asked)
    return counts


def _encode(tokenizer, document: Document, turns: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of the document with its turns, and where each answer with its EOS stands."""
    ids, spans = tokenizer(document.opening).input_ids, []
    for turn in document.turns[:turns]:
        ids += tokenizer(f"\n\n{turn.question}", add_special_tokens=False).input_ids
        answer = tokenizer(turn.answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return ids, spans
