"""Several ways to go on from one compressed prompt, compared by the log-probability of their tokens.

The prompt's last token is held back until compression is done: otherwise the first token of every choice, the only one
of many, would be predicted by exact attention over the whole prompt, and no method could change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runners.generate import MakesCache, Timings, start
from runners.prompt import Encoder
from runners.session import now
from tasks.base import Choice, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Asked:
    """One choice as token ids.

    prompt: what stands before it.  n_context: how many of these end inside the example's context.
    text: its own.  cut: the start of the prompt was left out.
    """

    prompt: tuple[int, ...]
    n_context: int
    text: tuple[int, ...]
    cut: bool = False

    def parts(self, protocol: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What of the prompt is compressed, and what is fed afterwards."""
        most = len(self.prompt) - 1
        at = max(1, most if protocol == "aware" else min(self.n_context, most))
        return self.prompt[:at], self.prompt[at:]


def encode(encoder: Encoder, example: Example, choice: Choice) -> Asked:
    """Token ids as lm_eval makes them: prompt and text are encoded together, and the text's begin where those of the
    prompt alone end. A prompt that is too long loses its start. Raises ValueError if the text has no room, or no token.
    """
    prompt, text = example.context + choice.question, choice.text
    if prompt:
        bare = prompt.rstrip()  # white space before the text is part of its first token
        ids = [*encoder.opening, *encoder.plain(bare)]
        whole = [*encoder.opening, *encoder.plain(prompt + text)]
        own = whole[len(ids) :]
    else:
        tokenizer = encoder.tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        own = encoder.plain(text)
        ids, own = ([prefix], own) if own[:1] != [prefix] else (own[:1], own[1:])
    if not ids or not own:
        raise ValueError("a choice needs a token, and one before it")
    context = [*encoder.opening, *encoder.plain(example.context)]
    n_context = next((i for i, (a, b) in enumerate(zip(ids, context)) if a != b), min(len(ids), len(context)))
    limit = min((n for n in (encoder.max_length, encoder.window) if n is not None), default=None)
    return fit(ids, n_context, own, limit)


def fit(prompt: Sequence[int], n_context: int, text: Sequence[int], limit: int | None) -> Asked:
    """A choice whose prompt has lost as much of its start as it takes to feed at most `limit` tokens.

    Raises ValueError if the choice alone has no room.
    """
    lost = 0 if limit is None else max(0, len(prompt) + len(text) - limit - 1)  # the last token is not fed
    if lost >= len(prompt):
        raise ValueError(f"a choice takes {len(text)} tokens; prompt and choice together have room for {limit}")
    return Asked(tuple(prompt[lost:]), max(0, n_context - lost), tuple(text), lost > 0)


@dataclass
class _Row:
    """A prompt, once, and the choices that follow it: places in the batch."""

    first: tuple[int, ...]
    rest: tuple[int, ...]
    sample: int
    members: list[tuple[int, int]]


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    method: MakesCache,
    asked: Sequence[Sequence[Asked]],
    samples: Sequence[int],
    protocol: str = "aware",
    chunk: int | None = None,
    stride: int | None = None,
    pad_id: int = 0,
) -> tuple[list[list[tuple[float, bool]]], Any, Timings]:
    """For every example and choice the log-likelihood in nats and whether all its tokens were the likeliest; the cache
    that they were made with, and the time it took.

    Choices of equal prompts share one compressed cache, from which each goes on by itself. protocol: "aware" compresses
    the prompt but for its last token, "agnostic" the example's context. stride: tokens of a choice fed at once.
    """
    rows = _rows(asked, samples, protocol)
    began = now(model.device)
    session, after = start(model, method, [row.first for row in rows], [row.sample for row in rows], chunk, pad_id)
    prompt_done = now(model.device)
    if any(len(row.rest) > 1 for row in rows):
        session.feed([row.rest[:-1] for row in rows])
    question_done = now(model.device)
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    cache, steps = session.cache, 0
    for turn in range(max(len(row.members) for row in rows)):
        members = [row.members[min(turn, len(row.members) - 1)] for row in rows]
        texts = [asked[i][j].text for i, j in members]
        parts = [(*row.rest[-1:], *text[:-1]) for row, text in zip(rows, texts)]
        fed = after[:, None, :][:, :0]  # [B, T, V], after every token of the parts
        if any(parts):
            # a fork leaves what the next choice starts from as it is
            own = session.fork()
            # filled up on the right: what comes after a text cannot change its score
            width = max(map(len, parts))
            ids = torch.tensor([[*part, *[pad_id] * (width - len(part))] for part in parts])
            fed = own.run(ids, chunk=stride, every=True)
            cache, steps = own.cache, steps + width
        for i, (place, text, row) in enumerate(zip(members, texts, rows)):
            logits = fed[i, : len(text) - (not row.rest)]
            if not row.rest:  # a prompt of one token, which could not be held back
                logits = torch.cat((after[i : i + 1], logits))
            found[place] = _likelihood(logits, torch.tensor(text, device=logits.device))
    sums = torch.stack([total for total, _ in found.values()]).tolist()
    likeliest = torch.stack([best for _, best in found.values()]).tolist()
    done = dict(zip(found, zip(sums, likeliest)))
    timings = Timings(
        prompt=prompt_done - began,
        question=question_done - prompt_done,
        decode=now(model.device) - question_done,
        n_prompt=sum(len(row.first) for row in rows),
        steps=steps,
    )
    return [[done[i, j] for j in range(len(choices))] for i, choices in enumerate(asked)], cache, timings


def _rows(asked: Sequence[Sequence[Asked]], samples: Sequence[int], protocol: str) -> list[_Row]:
    """One row for every prompt that is different inside its example."""
    found: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for i, choices in enumerate(asked):
        for j, one in enumerate(choices):
            first, rest = one.parts(protocol)
            found.setdefault((i, one.prompt), _Row(first, rest, samples[i], [])).members.append((i, j))
    return list(found.values())


def _likelihood(logits: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the log-probabilities of tokens [T] from logits [T, V], and whether each of them is the likeliest."""
    own = logits.float().log_softmax(-1).gather(-1, text[:, None])  # [T, 1]
    return own.sum(), (logits.argmax(-1) == text).all()
