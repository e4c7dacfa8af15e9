"""The new tokens of a batch: the likeliest one of every row or one that is drawn, and when a row has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.noise import uniform
from tasks.sampling import GREEDY, Sampling

STREAM = 0x5A3D  # what else is drawn by the same seeds and samples is drawn from another stream


@dataclass(frozen=True)
class Stops:
    """Strings that end an answer as soon as its text holds one of them.

    text: an answer's tokens, or its last ones, as text.  said: all its tokens as the text in which a stop counts.
    """

    strings: tuple[str, ...]
    text: Callable[[Sequence[int]], str]
    said: Callable[[Sequence[int]], str]

    @property
    def width(self) -> int:
        """Last tokens whose text holds any stop that the newest of them completes.

        A token has a byte at least. Twice as many, since decoding may leave blanks out, and what stands first is not
        always decoded as it is further on.
        """
        return 2 * max(len(stop.encode()) for stop in self.strings) + 4

    def within(self, text: str) -> bool:
        """Whether a text holds any of the strings."""
        return any(stop in text for stop in self.strings)


@dataclass(frozen=True)
class Draw:
    """Which draws are an answer's own: they depend on nothing else, so that they are the same in any batch and order.

    sample: the number of the sample.  repeat: which of its answers.  turn: which of its questions.
    """

    how: Sampling
    sample: int
    repeat: int = 0
    turn: int = 0


@dataclass(frozen=True)
class Limits:
    """When a row's answer ends: at one of the token ids `ends` or strings `stops` after `least` tokens, or at `most`.

    draw: how tokens are drawn; None takes the likeliest.
    """

    most: int
    least: int = 0
    ends: tuple[int, ...] = ()
    stops: Stops | None = None
    draw: Draw | None = None


@dataclass(frozen=True)
class Answer:
    """One row's new tokens, the one that ended it included.

    stop: "end" for an end token, "string" for a stop string, "length" for the most tokens.
    error: why the tokens mean nothing, such as a NaN in the logits.
    """

    ids: list[int]
    stop: str
    error: str | None = None


class NewTokens:
    """The new tokens of a batch, and which rows have ended; the device is waited for in `ended` and `answers` alone."""

    def __init__(self, limits: Sequence[Limits], device: torch.device):
        self.limits = list(limits)
        self.most = max(limit.most for limit in limits)
        width = max(1, *(len(limit.ends) for limit in limits))
        ends = [[*limit.ends, *[-1] * (width - len(limit.ends))] for limit in limits]
        self.ends = torch.tensor(ends, device=device)  # [B, E], filled up with -1
        self.limit = torch.tensor([limit.most for limit in limits], device=device)
        self.done = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self.broken = torch.full_like(self.limit, -1)  # the first token whose logits hold a NaN
        self.tokens: list[Tensor] = []
        self.dice = Dice.of([limit.draw for limit in limits], device) if any(one.draw for one in limits) else None
        self.readers = [None if limit.stops is None else _Reader(limit.stops, limit) for limit in limits]
        self.read = 0  # tokens of every row that its reader has seen

    def take(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B], from logits [B, V]."""
        taken = len(self.tokens)
        if taken < max(limit.least for limit in self.limits):
            logits = logits.clone()
            for row, limit in enumerate(self.limits):
                if taken < limit.least:
                    logits[row, list(limit.ends)] = -torch.inf
        best, token = logits.max(dim=-1)
        if self.dice is not None:
            token = self.dice.choose(logits, token, taken)
        broken = best.isnan() & ~self.done
        self.broken.masked_fill_(broken, taken)
        self.tokens.append(token)
        self.done |= broken | (token[:, None] == self.ends).any(dim=-1) | (taken + 1 >= self.limit)
        return token

    def ended(self) -> list[bool]:
        """For each row whether its answer has ended; waits for the device, once."""
        if not any(self.readers):
            return self.done.tolist()
        *new, ended = torch.stack([*self.tokens[self.read :], self.done.long()]).tolist()
        self.read = len(self.tokens)
        for row, reader in enumerate(self.readers):
            # also where the device has seen an end: a stop may have come before it
            if reader is not None and reader.ends_in(step[row] for step in new) and not ended[row]:
                ended[row] = self.done[row] = True
        return [bool(one) for one in ended]

    def answers(self) -> list[Answer]:
        """What every row has answered so far."""
        if any(self.readers):
            self.ended()  # what has come since the last look is read
        tokens, broken = torch.stack(self.tokens, dim=1).tolist(), self.broken.tolist()
        answers = []
        for ids, at, limit, reader in zip(tokens, broken, self.limits, self.readers, strict=True):
            kept = ids[: limit.most]
            stop = "length"
            end = next((i + 1 for i, token in enumerate(kept) if token in limit.ends), None)
            if end is not None:
                kept, stop = kept[:end], "end"
            if reader is not None and 0 < reader.end <= len(kept):
                kept, stop = kept[: reader.end], "string"
            error = "the logits hold a NaN" if 0 <= at < len(kept) else None
            answers.append(Answer(kept, stop, error))
        return answers

    def keep(self, rows: Sequence[int]) -> Tensor:
        """Go on with these rows only; gives their numbers."""
        at = torch.tensor(rows, device=self.done.device)
        self.limits, self.readers = [self.limits[row] for row in rows], [self.readers[row] for row in rows]
        for name in ("ends", "limit", "done", "broken"):
            setattr(self, name, getattr(self, name)[at])
        self.dice = None if self.dice is None else self.dice.keep(at)
        self.tokens = list(torch.stack(self.tokens, dim=1)[at].unbind(1))
        return at


class _Reader:
    """Reads an answer token by token, and notices the one that completes a stop string."""

    def __init__(self, stops: Stops, limit: Limits):
        self.stops, self.least, self.last = stops, max(1, limit.least), limit.ends
        self.width = stops.width
        self.ids: list[int] = []
        self.since = 0
        self.over = False  # whether a token has ended the answer
        self.end = 0  # tokens of the answer that a stop has ended

    def ends_in(self, tokens: Iterable[int]) -> bool:
        """Whether a stop has ended the answer, by the last of these tokens that follow those before."""
        for token in tokens:
            if self.over:
                break
            self._read(token)
        return self.end > 0

    def _read(self, token: int) -> None:
        if token in self.last and len(self.ids) >= self.least - 1:
            self.over = True
            return
        self.ids.append(token)
        n = len(self.ids)
        if n < self.least:
            return
        # the whole answer once; from then on the newest token is part of what it completes
        recent = self.ids if n == self.least else self.ids[max(self.since, n - self.width) :]
        if not self.stops.within(self.stops.text(recent)):
            return
        if self.stops.within(self.stops.said(self.ids)):
            self.end, self.over = n, True
        else:  # inside a block that does not count
            self.since = n


@dataclass
class Dice:
    """How the tokens of a batch are drawn; every field is a tensor [B], `seed` to `turn` say whose the numbers are.

    temperature: 0 takes the likeliest.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    sample: Tensor
    repeat: Tensor
    turn: Tensor

    @classmethod
    def of(cls, draws: Sequence[Draw | None], device: torch.device) -> Dice:
        """Those of a batch, one draw per row; None takes the likeliest token."""
        every = [draw or Draw(GREEDY, 0) for draw in draws]

        def column(*values: float) -> Tensor:
            return torch.tensor(values, device=device)

        return cls(
            column(*(one.how.temperature for one in every)).float(),
            column(*(one.how.top_k for one in every)),
            column(*(one.how.top_p for one in every)).double(),
            column(*(one.how.seed for one in every)),
            column(*(one.sample for one in every)),
            column(*(one.repeat for one in every)),
            column(*(one.turn for one in every)),
        )

    def keep(self, rows: Tensor) -> Dice:
        """Those of the rows that go on; rows: their indices."""
        return Dice(**{name: value[rows] for name, value in vars(self).items()})

    def choose(self, logits: Tensor, likeliest: Tensor, step: int) -> Tensor:
        """The tokens [B] of a step, from logits [B, V]."""
        at = torch.full_like(self.seed, step)
        u = uniform(STREAM, self.seed, self.sample, self.repeat, self.turn, at)
        drawn = draw_tokens(logits, self.temperature, self.top_k, self.top_p, u)
        return torch.where(self.temperature > 0, drawn, likeliest)


def draw_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Tokens [B] at places u [B] in [0, 1) of the probabilities of logits [B, V], summed from the likeliest on.

    All [B]; temperature above 0.  top_k: how many of the likeliest are left, 0: all.  top_p: a token is left if those
    before it have less than that; the first one always is.
    """
    heat = torch.where(temperature > 0, temperature, 1.0)
    scores, order = (logits.float() / heat[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    left_out = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    # sums over a whole vocabulary: in single precision they would depend on how a device adds
    p = scores.masked_fill(left_out, -torch.inf).double().softmax(-1)
    before = p.cumsum(-1) - p
    mass = p.masked_fill(before >= top_p[:, None], 0.0).cumsum(-1)
    at = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, at)[:, 0]


def behind(answers: Sequence[Answer], steps: int) -> list[int]:
    """How many of so many decode steps every row was fed after its own last one; an answer's last token is not fed."""
    return [max(0, steps - len(answer.ids) + 1) for answer in answers]
