"""Rows of tokens to train on, and held-out ones: of a text file, or of generated documents in turn with prose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.core.reading import read_text
from runners.learn.calibrate import generated
from tasks.documents.pools import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.05  # of a text file: its end


def split_text(file: str) -> tuple[str, str]:
    """What is trained on, and what is measured on: the end of the file."""
    text = read_text(Path(file).expanduser())
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def row_of(tokenizer: PreTrainedTokenizerBase, seed: int, row: int, length: int, split: Split) -> Tensor:
    """Generated documents in turn with prose, [length], begun by BOS where the tokenizer has one."""
    return torch.tensor(tokenizer("".join(generated(seed, row, length, split)), verbose=False).input_ids[:length])


def rows_of(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """The text cut into rows [N, length], each begun by BOS where the tokenizer has one; the rest is left out."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = length - len(begin)
    cut = ids[: len(ids) // width * width].view(-1, width)
    return torch.cat((torch.tensor(begin, dtype=torch.long).expand(len(cut), -1), cut), dim=1)


def pick_rows(rows: Tensor, seed: int, batch: int, size: int) -> Tensor:
    """The rows of one batch: every row once, in an order drawn anew, before any comes again."""
    indices = torch.arange(batch * size, (batch + 1) * size)
    orders: dict[int, Tensor] = {}
    for epoch in (indices // len(rows)).unique().tolist():
        orders[epoch] = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1009 + epoch))
    return rows[[int(orders[index // len(rows)][index % len(rows)]) for index in indices.tolist()]]
