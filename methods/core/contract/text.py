"""What the rows of a batch say, for methods that look at tokens and not at numbers alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: parts of a prompt that a method may ask for by name: what the chat template writes before it, the text that is asked
#: about, the question, and what says how to answer
SPANS = ("template", "context", "question", "instruction")


@dataclass(frozen=True)
class Vocabulary:
    """Kinds of tokens, bool [V] each, on the model's device.

    special: beginnings, ends, roles and other marks of the tokenizer's own.  punctuation: tokens of nothing but
    punctuation (Unicode's classes P), spaces around it left out.  newline: tokens that hold a line's end.
    encode: token ids of a text, without special ones.
    """

    special: Tensor
    punctuation: Tensor
    newline: Tensor
    encode: Callable[[str], list[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device) -> Vocabulary:
        """That of a tokenizer, for a model with `size` embeddings; those beyond the tokenizer are of no kind."""
        special, punctuation, newline = (torch.zeros(size, dtype=torch.bool) for _ in range(3))
        flagged = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
        for id in {*tokenizer.all_special_ids, *flagged}:
            if id < size:
                special[id] = True
        for id in range(min(size, len(tokenizer))):
            if special[id]:
                continue
            text = tokenizer.decode([id])
            said = text.strip()
            punctuation[id] = bool(said) and all(unicodedata.category(c).startswith("P") for c in said)
            newline[id] = "\n" in text
        where = (special.to(device), punctuation.to(device), newline.to(device))
        return cls(*where, lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False))


def spans_of(rows: Sequence[Mapping[str, tuple[int, int]]]) -> Tensor:
    """Parts of every row, [B, len(SPANS), 2], int32: first token and the one behind the last, by the row's own count.

    A part that a row does not have is (-1, -1). Raises UserError for a name that is none of SPANS, or no part.
    """
    table = torch.full((len(rows), len(SPANS), 2), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        for name, (first, end) in row.items():
            if name not in SPANS:
                raise UserError(f"spans: row {i} names {name!r}; there are {', '.join(SPANS)}")
            if not 0 <= first <= end:
                raise UserError(
                    f"spans: {name} of row {i} is ({first}, {end}); give its first token and the one behind it"
                )
            table[i, SPANS.index(name)] = torch.tensor([first, end])
    return table
