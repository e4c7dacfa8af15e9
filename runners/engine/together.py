"""Many methods on the same samples: what each gives alone, from one pass over each prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.core.contract import Method
from methods.core.errors import BudgetMiss
from methods.core.meter import Report
from runners.engine.answer import (
    Setting,
    answered,
    choices_of,
    compared,
    predicted,
    run_of,
    spent,
    talk_of,
    talked,
    texts,
)
from runners.engine.choices import Choices
from runners.engine.generation import Prompt, Timings
from runners.engine.new_tokens import Answer
from runners.engine.session import Heard, Session, now
from runners.engine.shared_prefill import Group, Member
from runners.engine.teacher_forcing import Text
from runners.engine.time_limit import TimeLimit, within
from tasks.base import Example, Forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Outcome:
    """What one method made of the prompts.

    answers: one per prompt; none where `error` says why.  ledgers: of their rows of its own cache, as in a run alone.
    error: what went wrong with this method alone; the others are not touched by it.
    """

    answers: list[Answer]
    ledgers: list[Report]
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
    began = now(model.device)
    group, logits = begin(model, methods, firsts, [prompt.sample for prompt in prompts], chunk, pad_id)
    prompt_done = now(model.device)
    if group.active and any(rest for _, rest in parts):
        logits = group.feed([rest for _, rest in parts])
    question_done = now(model.device)
    limits = [prompt.limits for prompt in prompts]
    outcomes = []
    for one in group.answer(logits, limits, seconds=limit, spent=question_done - began):
        times = prompt_done - began, question_done - prompt_done
        if isinstance(one, Heard):
            timings = Timings(*times, one.at - question_done, sum(map(len, firsts)), one.steps)
            outcomes.append(Outcome(one.answers, one.reports, timings))
        else:
            outcomes.append(Outcome([], [], Timings(*times, 0.0, 0, 0), one))
    return outcomes


def begin(
    model: PreTrainedModel,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    chunk: int | None = None,
    pad_id: int = 0,
) -> tuple[Group, Tensor]:
    """What `start` gives for one method: a group behind its prompts, and the logits after them, [active * B, V]."""
    n = max(map(len, prompts))
    in_chunks = chunk is not None and chunk < n

    def read(session: Session) -> Tensor:
        return session.feed(prompts, chunk if in_chunks else None)

    return Group.begin(model, methods, samples, read, n if in_chunks else None, pad_id)


@contextlib.contextmanager
def limited(group: Group, seconds: float | None, spent: float) -> Iterator[None]:
    """Inside the block all members fail with TimeLimit once the time is up. spent: seconds that are gone already."""
    try:
        with within(group.model, seconds, spent):
            yield
    except TimeLimit as error:
        for member in group.members:
            member.fail(error)


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
    group, losses = Group.begin(model, methods, samples, text.begin)
    prompt_done = now(model.device)
    with limited(group, limit, prompt_done - began):
        if group.active:
            text.go_on(group.session, losses)
    timings = text.timings(prompt_done - began, now(model.device) - prompt_done)
    own = {member: rows for member, rows in zip(group.active, losses.split(len(pieces)))}
    found = []
    for member in group.members:
        ledgers = member.cache.reports() if member.error is None else []
        found.append(Predicted(own.get(member, losses[:0]), ledgers, timings, member.error))
    return found


@dataclass
class Predicted:
    """What one method made of texts: losses [B, L], and the rest as in Outcome."""

    losses: Tensor
    ledgers: list[Report]
    timings: Timings
    error: Exception | None = None


def why_alone(example: Example) -> str | None:
    """Why an example is run for one method after the other; None where its prompt can be read once for several."""
    if example.kind == "answer":
        return None if example.beams == 1 else "a beam search"
    if example.kind == "turns":
        return "questions that go on from answers of their own" if example.history == "own" else None
    if example.forced is not None:
        return "one pass over a text" if example.forced.through == "one_pass" else None
    return "times are taken of one cell after the other" if example.kind == "timed" else None


def answer_together(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None = None
) -> list[list[dict[str, Any]] | Exception]:
    """For each method the rows of a batch, as `runners.engine.answer` makes them alone, marked with the group's size.

    An exception in a method's place concerns that method. Raises what concerns all of them, such as OutOfMemoryError.
    """
    found: list[list[dict[str, Any]] | Exception] = [[] for _ in methods]
    for _, alike in groupby(batch, run_of):
        part = list(alike)
        for i, rows in enumerate(_BY_KIND[part[0].kind](setting, methods, part, limit)):
            before = found[i]
            if not isinstance(before, Exception):
                found[i] = rows if isinstance(rows, Exception) else [*before, *rows]
    return found


def _answers(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    encoded = [setting.encoder(example) for example in batch]
    prompts = [one.prompt for one in encoded]
    found = together(setting.model, methods, prompts, setting.protocol, setting.chunk, setting.pad_id, limit)
    for method, one in zip(methods, found, strict=True):

        def rows(method: Method = method, one: Outcome = one) -> list[dict[str, Any]]:
            costs = spent(setting, method, one.ledgers, one.timings, group=len(methods))
            return [answered(setting, *each) for each in zip(batch, encoded, one.answers, costs, strict=True)]

        yield one.error or kept(rows)


def _predictions(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    pieces, plan, samples = texts(setting, batch)
    found = force_together(setting.model, methods, pieces, plan, samples, limit)
    for method, one in zip(methods, found, strict=True):

        def rows(method: Method = method, one: Predicted = one) -> list[dict[str, Any]]:
            costs = spent(setting, method, one.ledgers, one.timings, group=len(methods))
            return predicted(setting, batch, pieces, one.losses, one.timings.n_prompt, costs)

        yield one.error or kept(rows)


@torch.inference_mode()
def _talks(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    talk = talk_of(setting, batch)
    began = now(setting.model.device)
    group, logits = begin(setting.model, methods, talk.firsts, talk.samples, setting.chunk, setting.pad_id)
    seconds = now(setting.model.device) - began
    with limited(group, limit, seconds):
        if group.active:
            talk.go_on(group, logits)
    for i, member in enumerate(group.members):
        heard = [one for question in talk.heard if isinstance(one := question[i], Heard)]

        def rows(method: Method = member.method, heard: list[Heard] = heard) -> list[dict[str, Any]]:
            costs = spent(setting, method, heard[-1].reports, talk.timings(seconds), group=len(methods))
            return talked(setting, batch, talk, heard, costs)

        yield member.error or kept(rows)


@torch.inference_mode()
def _choices(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None
) -> Iterator[list[dict[str, Any]] | Exception]:
    asked, samples = choices_of(setting, batch)
    choices = Choices(asked, samples, setting.protocol, batch[0].stride, setting.pad_id)
    began = now(setting.model.device)
    group, after = begin(setting.model, methods, choices.firsts, choices.samples, setting.chunk, setting.pad_id)
    prompt_done = now(setting.model.device)
    found = {}
    with limited(group, limit, prompt_done - began):
        if group.active:
            found = dict(zip(group.active, choices.rate(group, after), strict=True))
    timings = choices.timings(prompt_done - began, now(setting.model.device) - prompt_done)
    for member in group.members:

        def rows(member: Member = member) -> list[dict[str, Any]]:
            costs = spent(setting, member.method, choices.reports(member.cache), timings, group=len(methods))
            return [compared(setting, *each) for each in zip(batch, asked, found[member], costs, strict=True)]

        yield member.error or kept(rows)


def kept(rows: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]] | BudgetMiss:
    """What one method made of a batch, or that it missed a budget which it is held to."""
    try:
        return rows()
    except BudgetMiss as miss:
        return miss


_BY_KIND = {"answer": _answers, "forced": _predictions, "turns": _talks, "choices": _choices}
