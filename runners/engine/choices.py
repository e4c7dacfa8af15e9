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

from methods.core.meter import Report
from runners.engine.generation import MakesCache, Reading, Timings, in_chunks, through
from runners.engine.prompt import Encoder
from runners.engine.session import Member, State
from tasks.base import Choice, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EncodedChoice:
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


def encode(encoder: Encoder, example: Example, choice: Choice) -> EncodedChoice:
    """Token ids as lm_eval makes them: prompt and text are encoded together, and the text's begin where those of the
    prompt alone end. A prompt that is too long loses its start. Raises ValueError if the text has no room, or no token.
    """
    prompt, text = example.context + choice.question, choice.text
    opening, start = encoder.opening, example.context
    if prompt and encoder.chats(example):
        split = len(start)
        prompt, _, split, _ = encoder.wrap(prompt, split)
        opening, start = [], prompt[:split]  # a template writes its own
    if prompt:
        bare = prompt.rstrip()  # white space before the text is part of its first token
        ids = [*opening, *encoder.plain(bare)]
        whole = [*opening, *encoder.plain(prompt + text)]
        text_ids = whole[len(ids) :]
    else:
        tokenizer = encoder.tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        text_ids = encoder.plain(text)
        ids, text_ids = ([prefix], text_ids) if text_ids[:1] != [prefix] else (text_ids[:1], text_ids[1:])
    if not ids or not text_ids:
        raise ValueError("a choice needs a token, and one before it")
    context = [*opening, *encoder.plain(start)]
    n_context = next((i for i, (a, b) in enumerate(zip(ids, context)) if a != b), min(len(ids), len(context)))
    limit = min((n for n in (encoder.max_length, encoder.window) if n is not None), default=None)
    return fit(ids, n_context, text_ids, limit)


def fit(prompt: Sequence[int], n_context: int, text: Sequence[int], limit: int | None) -> EncodedChoice:
    """A choice whose prompt has lost as much of its start as it takes to feed at most `limit` tokens.

    Raises ValueError if the choice alone has no room.
    """
    lost = 0 if limit is None else max(0, len(prompt) + len(text) - limit - 1)  # the last token is not fed
    if lost >= len(prompt):
        raise ValueError(f"a choice takes {len(text)} tokens; prompt and choice together have room for {limit}")
    return EncodedChoice(tuple(prompt[lost:]), max(0, n_context - lost), tuple(text), lost > 0)


@dataclass
class _Row:
    """A prompt, once, and the choices that follow it: places in the batch."""

    first: tuple[int, ...]
    rest: tuple[int, ...]
    sample: int
    members: list[tuple[int, int]]


#: for every example and choice the log-likelihood in nats, and whether all its tokens were the likeliest
Likelihoods = list[list[tuple[float, bool]]]


def compare_choices(
    model: PreTrainedModel,
    method: MakesCache,
    asked: Sequence[Sequence[EncodedChoice]],
    samples: Sequence[int],
    protocol: str = "aware",
    chunk: int | None = None,
    stride: int | None = None,
    pad_id: int = 0,
) -> tuple[Likelihoods, list[Report], Timings]:
    """The choices' likelihoods, the ledgers of the caches that they were made with, and the time it took.

    Choices of equal prompts share one compressed cache, from which each goes on by itself. protocol: "aware" compresses
    the prompt but for its last token, "agnostic" the example's context. stride: tokens of a choice fed at once.
    """
    choices = Choices(asked, samples, protocol, stride, pad_id)
    state, took = through(model, [method], choices, chunk, pad_id)
    (member,) = state.members
    return choices.likelihoods[member], choices.reports(member.cache), choices.timings(*took)


class Choices:
    """The prompts of a batch, each once, and the choices behind them.

    firsts, samples: what is read and compressed, and whose it is; a row per prompt.
    likelihoods: of each cache that neither failed nor ended.
    """

    def __init__(
        self,
        asked: Sequence[Sequence[EncodedChoice]],
        samples: Sequence[int],
        protocol: str,
        stride: int | None,
        pad_id: int,
    ):
        self.asked, self.stride, self.pad_id = asked, stride, pad_id
        self.rows = _rows(asked, samples, protocol)
        self.firsts, self.samples = [row.first for row in self.rows], [row.sample for row in self.rows]
        self.likelihoods: dict[Member, Likelihoods] = {}
        self.steps = 0
        self.passes = 0  # of the choices that were fed last

    def reading(self, chunk: int | None) -> Reading:
        """How the prompts are read; see `Plan`."""
        return in_chunks(self.firsts, chunk)

    def go_on(self, state: State, outputs: Tensor) -> None:
        """Compare them; outputs [caches * rows, V]: the logits after the prompts."""
        self.likelihoods = dict(zip(state.active, self._rate(state, outputs), strict=True))

    def _rate(self, state: State, after: Tensor) -> list[Likelihoods]:
        rows = self.rows
        if any(len(row.rest) > 1 for row in rows):
            state.feed([row.rest[:-1] for row in rows])
        after = after.unflatten(0, (-1, len(rows)))  # [caches, rows, V]
        scores: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # each [caches]
        turns = max(len(row.members) for row in rows)
        for turn in range(turns):
            members = [row.members[min(turn, len(row.members) - 1)] for row in rows]
            texts = [self.asked[i][j].text for i, j in members]
            # what the next choice starts from stays as it is
            fed = self._feed(state if turn + 1 == turns else state.fork(), texts, after)
            for i, (choice, text, row) in enumerate(zip(members, texts, rows)):
                logits = fed[:, i, : len(text) - (not row.rest)]
                if not row.rest:  # a prompt of one token, which could not be held back
                    logits = torch.cat((after[:, i, None], logits), dim=1)
                scores[choice] = _likelihood(logits, torch.tensor(text, device=logits.device))
        sums = torch.stack([total for total, _ in scores.values()], dim=1).tolist()
        likeliest = torch.stack([best for _, best in scores.values()], dim=1).tolist()
        by_cache = [dict(zip(scores, zip(*rated))) for rated in zip(sums, likeliest)]
        return [[[rated[i, j] for j in range(len(asked))] for i, asked in enumerate(self.asked)] for rated in by_cache]

    def _feed(self, state: State, texts: Sequence[Sequence[int]], after: Tensor) -> Tensor:
        """Logits [caches, rows, T, V] behind every token of a choice per row, its last one left out."""
        parts = [(*row.rest[-1:], *text[:-1]) for row, text in zip(self.rows, texts)]
        self.passes = 0
        if not any(parts):
            return after[:, :, None][:, :, :0]
        # filled up on the right: what comes after a text cannot change its score
        width = max(map(len, parts))
        ids = torch.tensor([[*part, *[self.pad_id] * (width - len(part))] for part in parts])
        self.steps += width
        self.passes = -(-width // (self.stride or width))
        return state.run(ids, chunk=self.stride, every=True).unflatten(0, (-1, len(parts)))

    def reports(self, cache: Any) -> list[Report]:
        """Of every example the ledger of its prompts together, by when the choices begin: they are filled up."""
        by_example: list[list[int]] = [[] for _ in self.asked]
        for i, row in enumerate(self.rows):
            by_example[row.members[0][0]].append(i)
        behind = [self.passes] * len(self.rows)
        return [cache.meter.report(rows, behind) for rows in by_example]

    def timings(self, prompt: float, choices: float) -> Timings:
        """Of all choices. prompt, choices: seconds."""
        return Timings(prompt, 0.0, choices, n_prompt=sum(map(len, self.firsts)), steps=self.steps)


def _rows(asked: Sequence[Sequence[EncodedChoice]], samples: Sequence[int], protocol: str) -> list[_Row]:
    """One row for every prompt that is different inside its example."""
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for i, choices in enumerate(asked):
        for j, one in enumerate(choices):
            first, rest = one.parts(protocol)
            rows.setdefault((i, one.prompt), _Row(first, rest, samples[i], [])).members.append((i, j))
    return list(rows.values())


def _likelihood(logits: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the log-probabilities of tokens [T] from logits [n, T, V], and whether each is the likeliest; [n]."""
    logprobs = logits.float().log_softmax(-1).gather(-1, text[None, :, None].expand(len(logits), -1, 1))  # [n, T, 1]
    return logprobs.sum((1, 2)), (logits.argmax(-1) == text).all(-1)
