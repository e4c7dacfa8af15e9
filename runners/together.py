"""Many methods on the same samples: what `generate` and `force` give alone, from one pass over each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.core.contract import Method
from runners.answer import Setting, answered, predicted, run_of, spent, texts
from runners.forced import Text
from runners.generate import Prompt, Timings
from runners.group import Group, Member
from runners.session import Answer, Session, now
from runners.time_limit import TimeLimit, within
from tasks.base import Example, Forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Outcome:
    """What one method made of the prompts.

    answers: one per prompt; none where `error` says why.  ledger: of its own cache, as in a run alone.
    error: what went wrong with this method alone; the others are not touched by it.
    """

    answers: list[Answer]
    ledger: dict[str, Any]
    timings: Timings
    error: Exception | None = None


@torch.inference_mode()
def together(
    model: PreTrainedModel,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    protocol: str = "aware",
    chunk: int | None = None,
    pad_id: int = 0,
    limit: float | None = None,
) -> list[Outcome]:
    """What `generate` gives for each of the methods, from one pass over the prompts; one outcome per method.

    Tokens and ledgers equal those of single runs; times are the group's. limit: seconds until those that have not ended
    fail with TimeLimit. Raises what concerns all members, such as OutOfMemoryError; methods that change the prompt
    cannot be members.
    """
    assert not any(method.changes_prompt for method in methods), "a method that changes the prompt runs alone"
    parts = [prompt.parts(protocol) for prompt in prompts]
    firsts = [first for first, _ in parts]
    n = max(map(len, firsts))
    in_chunks = chunk is not None and chunk < n

    def read(session: Session) -> Tensor:
        return session.feed(firsts, chunk if in_chunks else None)

    began = now(model.device)
    samples = [prompt.sample for prompt in prompts]
    group, logits = Group.begin(model, methods, samples, read, n if in_chunks else None, pad_id)
    logits = logits.repeat(len(group.active), 1)  # [active * B, V]
    prompt_done = now(model.device)
    if group.active and any(rest for _, rest in parts):
        logits = group.session.feed([rest for _, rest in parts] * len(group.active))
    question_done = now(model.device)

    def ended(member: Member, answers: list[Answer], steps: int) -> None:
        times = (prompt_done - began, question_done - prompt_done, now(model.device) - question_done)
        outcome = Outcome(
            answers, member.cache.report().to_dict(), Timings(*times, sum(len(a) for a, _ in parts), steps)
        )
        outcomes[member] = outcome

    outcomes: dict[Member, Outcome] = {}
    group.decode(logits, [prompt.limits for prompt in prompts], ended, None if limit is None else began + limit)
    nothing = Timings(prompt_done - began, question_done - prompt_done, 0.0, 0, 0)
    return [outcomes.get(member, Outcome([], {}, nothing, member.error)) for member in group.members]


@torch.inference_mode()
def force_together(
    model: PreTrainedModel,
    methods: Sequence[Method],
    pieces: Sequence[Sequence[int]],
    forced: Forced,
    samples: Sequence[int],
    limit: float | None = None,
) -> list[Predicted]:
    """What `force` gives for each of the methods, from one pass over the prompts; as in `together`."""
    began = now(model.device)
    text = Text(pieces, forced, model.device)
    group, losses = Group.begin(model, methods, samples, text.begin, more=True)
    losses = losses.repeat(len(group.active), 1)  # [active * B, L]
    prompt_done = now(model.device)
    try:
        with within(model, None if limit is None else limit - (prompt_done - began)):
            if group.active:
                text.go_on(group.session, losses)
    except TimeLimit:
        for member in group.active:
            member.fail(TimeLimit(f"was not done within time_limit={limit:g} seconds"))
    timings = text.timings(prompt_done - began, now(model.device) - prompt_done)
    own = {member: rows for member, rows in zip(group.active, losses.split(len(pieces)))}
    found = []
    for member in group.members:
        member.check_budget()
        ledger = member.cache.report().to_dict() if member.error is None else {}
        found.append(Predicted(own.get(member, losses[:0]), ledger, timings, member.error))
    return found


@dataclass
class Predicted:
    """What one method made of texts: losses [B, L], and the rest as in Outcome."""

    losses: Tensor
    ledger: dict[str, Any]
    timings: Timings
    error: Exception | None = None


def why_alone(example: Example) -> str | None:
    """Why an example is run for one method after the other; None where its prompt can be read once for several."""
    if example.kind == "answer":
        return None if example.beams == 1 else "a beam search"
    if example.forced is not None:
        return "one pass over a text" if example.forced.through == "one_pass" else None
    return {
        "turns": "several questions",
        "choices": "choices that are compared",
        "timed": "times are taken of one cell after the other",
    }[example.kind]


def answer_together(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None = None
) -> list[list[dict[str, Any]] | Exception]:
    """For each method the rows of a batch, as `runners.answer` makes them alone, marked with the group's size.

    An exception in a method's place concerns that method. Raises what concerns all of them, such as OutOfMemoryError.
    """
    found: list[list[dict[str, Any]] | Exception] = [[] for _ in methods]
    for _, alike in groupby(batch, run_of):
        part = list(alike)
        make = _answers if part[0].forced is None else _predictions
        for i, rows in enumerate(make(setting, methods, part, limit)):
            before = found[i]
            if not isinstance(before, Exception):
                found[i] = rows if isinstance(rows, Exception) else [*before, *rows]
    return found


def _answers(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    encoded = [setting.encoder(example) for example in batch]
    prompts = [one.prompt for one in encoded]
    for one in together(setting.model, methods, prompts, setting.protocol, setting.chunk, setting.pad_id, limit):
        costs = {**spent(setting, len(batch), one.ledger, one.timings), "group": len(methods)}
        yield one.error or [answered(setting, *each, costs) for each in zip(batch, encoded, one.answers)]


def _predictions(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    pieces, plan, samples = texts(setting, batch)
    for one in force_together(setting.model, methods, pieces, plan, samples, limit):
        costs = {**spent(setting, len(batch), one.ledger, one.timings), "group": len(methods)}
        yield one.error or predicted(setting, batch, pieces, one.losses, one.timings.n_prompt, costs)
