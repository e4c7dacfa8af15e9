"""A batch on its way through a model and one cache: parts are fed, answers decoded, and states forked."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from methods.core.meter import Report
from runners.engine.new_tokens import Answer, Limits, NewTokens, behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runners.engine.time_limit import TimeLimit

#: is shown a step of many caches: their logits [m * B, V], the tokens taken [m * B], and which m members they are of
See = Callable[[Tensor, Tensor, Sequence[int]], None]

# decode steps between two looks at whether all rows have ended: away from the CPU each look waits for the device
LOOK_EVERY = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class Generation:
    """What one cache answered: one answer per row of the prompts, the passes of the decoding.

    reports: the ledger of every row when it had ended; none of a cache that keeps none.
    seconds: until the last one had.
    """

    answers: list[Answer]
    reports: list[Report]
    steps: int
    seconds: float


class Member(Protocol):
    """One cache of a state.

    error: what ended it, if anything did.
    """

    cache: Any

    @property
    def error(self) -> Exception | None:
        """What ended it; None while nothing has."""
        ...

    def late(self, error: TimeLimit) -> None:
        """The time is up: it has failed with this error, unless it has ended before."""
        ...


class State(Protocol):
    """A batch behind its prompts: that of many caches, a Group, or of one alone, which is a Session.

    members: all caches.  active: those that neither failed nor ended.
    feed, run: as in Session; many caches are all fed the same, and their logits follow each other.
    """

    model: PreTrainedModel

    @property
    def members(self) -> Sequence[Member]:
        """All caches."""
        ...

    @property
    def active(self) -> Sequence[Member]:
        """Those that neither failed nor ended."""
        ...

    def feed(self, parts: Sequence[Sequence[int]], *, ends_prompt: bool = False) -> Tensor:
        """As `Session.feed`."""
        ...

    def run(self, ids: Tensor, *, chunk: int | None = None, ends_prompt: bool = False, every: bool = False) -> Tensor:
        """As `Session.run`."""
        ...

    def answer(
        self, logits: Tensor, limits: Sequence[Limits], *, exact: bool = False, see: See | None = None
    ) -> list[Generation | Exception]:
        """Answers of every cache, from the logits after what was last fed; see: is shown every step of many caches."""
        ...

    def fork(self) -> Self:
        """A state that goes on from here by itself."""
        ...


class Session:
    """The state of a batch: its cache, and which of the columns fed so far are padding.

    Rows are padded on the left in every part, so that all parts end together.
    steps: passes of all decoding so far.
    It is a group of one: its only member is itself, and what goes wrong is raised.
    """

    error: Exception | None = None

    def __init__(self, model: PreTrainedModel, cache: Any, rows: int, pad_id: int = 0):
        self.model, self.cache, self.pad_id = model, cache, pad_id
        self.mask = torch.ones(rows, 0, dtype=torch.long, device=model.device)  # [B, n], 1 is a token
        self.counts = torch.zeros(rows, 1, dtype=torch.long, device=model.device)  # tokens per row
        self.steps = 0
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )

    @property
    def members(self) -> Sequence[Session]:
        """Itself."""
        return [self]

    active = members

    def late(self, error: TimeLimit) -> None:
        """The time is up: raises the error."""
        raise error

    def feed(
        self, parts: Sequence[Sequence[int]], chunk: int | None = None, ends_prompt: bool = False, every: bool = False
    ) -> Tensor:
        """Logits after the last token of each row's part, [B, V]; with `every` after all columns, [B, T, V].

        chunk: columns per pass; None takes the part in one.
        ends_prompt: methods compress at the end of this part as at the end of the prompt; it is read in one pass.
        """
        return self.run(*_rectangle(parts, self.pad_id), chunk, ends_prompt, every)

    def run(
        self, ids: Tensor, mask: Tensor | None = None, chunk: int | None = None, ends_prompt: bool = False,
        every: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `feed`, for tokens [B, T] that are a rectangle already; mask [B, T] is 0 for padding, None: no padding."""
        ids = ids.to(self.model.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        pos = (self.counts + mask.cumsum(-1) - 1).clamp(min=0)
        before, n = self.mask.shape[1], ids.shape[1]
        width = n if ends_prompt or not chunk else chunk
        self.mask = torch.cat((self.mask, mask), dim=1)
        self.counts = self.counts + mask.sum(-1, keepdim=True)
        if ends_prompt:
            self.cache.compress_next()
        logits = []
        for a in range(0, n, width):
            b = min(a + width, n)
            logits.append(self._forward(ids[:, a:b], pos[:, a:b], self.mask[:, : before + b], every))
        return torch.cat(logits, dim=1) if every else logits[-1][:, -1]

    def decode(self, logits: Tensor, limits: Sequence[Limits], exact: bool = False) -> list[Answer]:
        """Answers of all rows from the logits [B, V] after what was fed; the last token is not fed.

        exact: stop at once when all rows have ended, so that nothing is fed behind a single row's answer.
        """
        rows, n = NewTokens(limits, logits.device), self.mask.shape[1]
        steps = max(0, rows.most - 1)
        self.expect(steps)
        mask = torch.cat((self.mask, self.mask.new_ones(len(limits), steps)), dim=1)
        pos = self.counts + torch.arange(steps, device=logits.device)
        new = rows.take(logits)
        look_every = 1 if exact else LOOK_EVERY.get(logits.device.type, 1)
        done = 0
        while done < steps:
            if done % look_every == 0 and all(rows.ended()):
                break
            logits = self._forward(new[:, None], pos[:, done : done + 1], mask[:, : n + done + 1], False)[:, -1]
            new = rows.take(logits)
            done += 1
        self.mask, self.counts = mask[:, : n + done], self.counts + done
        self.steps += done
        return rows.answers()

    def answer(
        self, logits: Tensor, limits: Sequence[Limits], exact: bool = False, see: See | None = None
    ) -> list[Generation | Exception]:
        """What `decode` gives, with the rows' ledgers; a cache alone has nothing to see."""
        began, before = now(self.model.device), self.steps
        answers = self.decode(logits, limits, exact)
        seconds, steps = now(self.model.device) - began, self.steps - before
        # the library's own caches keep no ledger
        keeps = hasattr(self.cache, "reports")
        return [Generation(answers, self.cache.reports(behind(answers, steps)) if keeps else [], steps, seconds)]

    def expect(self, new: int) -> None:
        """Let the cache make room for no more than so many tokens; the library's own caches do not ask."""
        if (expect := getattr(self.cache, "expect", None)) is not None:
            expect(new)

    def fork(self) -> Session:
        """A session that goes on from here by itself; what the method shares between sequences is not copied."""
        other = copy.copy(self)
        other.cache = self.cache.fork()
        return other

    def _forward(self, ids: Tensor, pos: Tensor, mask: Tensor, every: bool) -> Tensor:
        return self.model(
            input_ids=ids,
            # a single row has no padding, and models are faster without a mask
            attention_mask=mask if len(ids) > 1 else None,
            position_ids=pos,
            past_key_values=self.cache,
            use_cache=True,
            **({} if every else self._last_only),
        ).logits


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rectangle(parts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens, filled up on the left: ids and mask, both [B, T]."""
    n = max(map(len, parts))
    ids = [[pad_id] * (n - len(part)) + list(part) for part in parts]
    mask = [[0] * (n - len(part)) + [1] * len(part) for part in parts]
    return torch.tensor(ids), torch.tensor(mask)
