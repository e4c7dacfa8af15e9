"""From a batch of examples to recorded rows: one function per kind of example, for one method alone or for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from methods import load_method
from methods.core.contract import Method
from methods.core.errors import BudgetMiss, UserError
from methods.core.meter import Report
from runners.engine import rows
from runners.engine.beam_search import search_beams
from runners.engine.choices import Choices, encode
from runners.engine.conversation import Conversation, dialogue
from runners.engine.fidelity.forcing import Forcing
from runners.engine.generation import Plan, Prompts, Timings, Took, foreseen, start, through
from runners.engine.latency import measure
from runners.engine.problem import problem
from runners.engine.prompt import Encoded, number_of
from runners.engine.rows import failed
from runners.engine.session import Generation, Member, Session
from runners.engine.setting import Setting
from runners.engine.teacher_forcing import Text
from runners.engine.time_limit import within
from tasks.base import Example

FULL = "full"  # the method that every other one is compared with
RowsOrError = list[dict[str, Any]] | Exception  # of one method: a row per example, or what went wrong with it alone


def answer(
    setting: Setting, method: Method, batch: Sequence[Example], record: Callable[[dict[str, Any]], None]
) -> None:
    """Run a batch and record a row per sample; where a pass fails, its samples are tried one by one.

    Raises UserError, and where `budget_miss` is "fail" BudgetMiss, once a batch that held too much has been recorded.
    """
    for _, members in groupby(batch, _alike):
        _answer(setting, method, list(members), record)


def answer_together(
    setting: Setting, methods: Sequence[Method], batch: Sequence[Example], limit: float | None = None
) -> list[RowsOrError]:
    """For each method the rows of a batch, as `answer` records them, marked with the group's size.

    An exception in a method's place concerns that method. Raises what concerns all of them, such as OutOfMemoryError.
    """
    # a full cache that has answered before answers once more, as the others' witness
    panel = setting.panel
    witness = panel is not None and _full_of(methods) is None and any(panel.wants(batch))
    go = Pass(setting, [_full_like(methods), *methods] if witness else methods, True, limit, witness)
    by_method: list[RowsOrError] = [[] for _ in go.methods]
    for _, members in groupby(batch, _alike):
        for i, more in enumerate(go.run(list(members))):
            before = by_method[i]
            if not isinstance(before, Exception):
                by_method[i] = more if isinstance(more, Exception) else [*before, *more]
    return by_method[witness:]


def _full_like(methods: Sequence[Method]) -> Method:
    """The full cache that methods are held against: it holds numbers of their type."""
    return load_method(FULL).holding_in(methods[0].cache_dtype)


def _full_of(methods: Sequence[Method]) -> int | None:
    """Which of some methods is the full cache."""
    return next((i for i, method in enumerate(methods) if method.name == FULL), None)


def why_alone(example: Example) -> str | None:
    """Why an example is run for one method after the other; None where its prompt can be read once for several."""
    if example.kind == "answer":
        return None if example.beams == 1 else "a beam search"
    if example.kind == "turns":
        return "questions that go on from answers of their own" if example.history == "own" else None
    if example.forced is not None:
        return "one pass over a text" if example.forced.through == "one_pass" else None
    return "times are taken of one cell after the other" if example.kind == "timed" else None


def _alike(example: Example) -> tuple[Any, ...]:
    """The kind of an example in `_BY_KIND`, and what else the rows of one pass must have in common."""
    if example.kind == "timed":
        return ("timed", example.id)
    if example.forced is not None:
        return ("forced", example.forced.through, example.forced.length, example.forced.prompt, example.forced.stride)
    if example.kind == "turns":
        # a row that goes on from its own answers must end exactly where they do
        return ("turns", example.history, len(example.turns), example.history == "own" and example.id)
    if example.kind == "choices":
        return ("choices", example.stride)
    if example.beams > 1:
        return ("beams", example.id)
    return ("answer", example.begins)  # which is fed token by token, in all rows alike


def _answer(
    setting: Setting, method: Method, batch: Sequence[Example], record: Callable[[dict[str, Any]], None]
) -> None:
    try:
        with within(setting.model, setting.limit):
            (rows_or_error,) = Pass(setting, [method]).run(batch)
        if isinstance(rows_or_error, Exception):
            raise rows_or_error
    except UserError:
        raise
    except BudgetMiss as miss:
        for example in batch:
            record(failed(example, str(miss)))
        raise
    except Exception as error:  # one sample's failure must not cost the others
        why = problem(error)
        del error  # its traceback holds the tensors of the failed pass
        if setting.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            record(failed(batch[0], why))
            return
        for example in batch:
            _answer(setting, method, [example], record)
        return
    for row in rows_or_error:
        record(row)


@dataclass(frozen=True)
class Pass:
    """One way through batches: of a method alone, whose errors are raised, or of methods that share their prompts.

    limit: seconds that those have which share.  witness: the first of them is nobody's, and only seen by the others.
    """

    setting: Setting
    methods: Sequence[Method]
    shared: bool = False
    limit: float | None = None
    witness: bool = False

    def run(self, batch: Sequence[Example]) -> list[RowsOrError]:
        """What each method makes of a batch of examples that are alike."""
        return _BY_KIND[_alike(batch[0])[0]](self, batch)

    def forcing(self, batch: Sequence[Example]) -> Forcing | None:
        """The forced half of a batch that is answered; None where it has none, or no full cache beside it."""
        panel, full = self.setting.panel, _full_of(self.methods)
        if panel is None or self.methods[0].without_text:  # its answers are to another prompt
            return None
        panel.begin()
        if self.shared:
            beside = full is not None and len(self.methods) > 1
            wanted = panel.wants(batch) if beside else []
        else:
            (method,) = self.methods
            beside = full is None and not method.edits_model  # the weights of a full cache are the model's own
            wanted = panel.wants(batch, method.changes_prompt or why_alone(batch[0]) is not None) if beside else []
        return Forcing(panel, wanted, full) if any(wanted) else None

    def answered(self, plan: Prompts | Conversation) -> tuple[Sequence[Member], Took]:
        """As `through`, and then the forced half of the answers."""
        found = self.through(plan)
        if plan.forcing is not None:
            plan.forcing.settle(plan.heard[0] if plan.heard else [], lambda: self._full_beside(plan))
        return found

    def _full_beside(self, plan: Prompts | Conversation) -> tuple[Session, Tensor]:
        """A full cache that has read what a method alone has, and its logits."""
        setting = self.setting
        session, logits = start(
            setting.model, _full_like(self.methods), plan.firsts, plan.samples, setting.chunk, setting.pad_id
        )
        return session, plan.ask(session, logits)

    def through(self, plan: Plan) -> tuple[Sequence[Member], Took]:
        """The caches behind a plan, in the order of the methods, and the time it took."""
        setting = self.setting
        model, chunk, pad_id = setting.model, setting.chunk, setting.pad_id
        state, took = through(model, self.methods, plan, chunk, pad_id, self.limit, self.shared)
        return state.members, took

    def each(
        self, members: Sequence[Member], rows_of: Callable[[int, Member], list[dict[str, Any]]]
    ) -> list[RowsOrError]:
        """The rows of each cache, or why there are none; rows_of: from its index."""
        return [self._kept(i, member, rows_of) for i, member in enumerate(members)]

    def _kept(self, i: int, member: Member, rows_of: Callable[[int, Member], list[dict[str, Any]]]) -> RowsOrError:
        if member.error is not None:
            return member.error
        try:
            return rows_of(i, member)
        except BudgetMiss as miss:
            return miss

    def read(self, batch: Sequence[Example]) -> Sequence[Example]:
        """The examples as their prompts are read: whole, or without their texts."""
        return [example.without_text for example in batch] if self.methods[0].without_text else batch

    def beside_whole(
        self, batch: Sequence[Example], encoded: Sequence[Encoded], ledgers: Sequence[Report]
    ) -> Sequence[Report]:
        """The ledgers beside full caches of whole prompts, where the texts were left out of what was read."""
        if not self.methods[0].without_text:
            return ledgers
        longer = [
            len(self.setting.encoder(example).prompt.ids) - len(one.prompt.ids)
            for example, one in zip(batch, encoded, strict=True)
        ]
        slots = [ledger.full_prompt / len(one.prompt.ids) for one, ledger in zip(encoded, ledgers, strict=True)]
        more = [round(n * slot) for n, slot in zip(longer, slots, strict=True)]
        return [
            replace(ledger, full=ledger.full + n, full_prompt=ledger.full_prompt + n)
            for ledger, n in zip(ledgers, more, strict=True)
        ]

    def spent(self, index: int, ledgers: Sequence[Report], timings: Timings) -> list[dict[str, Any]]:
        """What every sample of a batch took, as its row records it: its own ledger, the batch's seconds.

        index: of the method.  Raises BudgetMiss where a sample that holds too much is to fail.
        """
        if self.setting.budget_miss == "fail":
            for ledger in ledgers:
                ledger.check_budget(self.methods[index].name)
        seconds = {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(timings).items()}
        shared = {"batch": len(ledgers), "threads": self.setting.threads, "timings": seconds}
        group = {"group": len(self.methods) - self.witness} if self.shared else {}
        return [{**shared, **group, "ledger": ledger.to_dict()} for ledger in ledgers]


def _answers(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """One question each: the prompt, then an answer, or several of them."""
    setting = go.setting
    encoded = [setting.encoder(example) for example in go.read(batch)]
    repeats, forcing = setting.encoder.sampling.repeats, go.forcing(batch)
    prompts = [one.prompt for one in encoded]
    asked = Prompts(
        prompts,
        setting.protocol,
        repeats,
        forcing,
        foreseen(setting.model, go.methods[0], prompts, setting.chunk, setting.pad_id),
    )
    members, took = go.answered(asked)

    def rows_of(i: int, _: Member) -> list[dict[str, Any]]:
        heard = asked.of(i)
        answers, ledgers = zip(*(one.answers for one in heard)), list(zip(*(one.reports for one in heard)))
        held = go.beside_whole(batch, encoded, list(map(rows.mean_ledger, ledgers)))
        costs = go.spent(i, held, asked.timings(took.prompt, i))
        found = [rows.repeated(setting, *one) for one in zip(batch, encoded, answers, ledgers, costs, strict=True)]
        return rows.with_forced(found, forcing.of(i) if forcing else ())

    return go.each(members, rows_of)


def _beams(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """One question each, answered by beam search, which a method does alone."""
    setting, ((method,), (example,)) = go.setting, (go.methods, batch)
    encoded = setting.encoder(example)
    best, cache, timings = search_beams(setting.model, method, encoded.prompt, example.beams, setting.pad_id)
    (costs,) = go.spent(0, [cache.report()], timings)  # of all beams together
    return [[rows.answered(setting, example, encoded, best, costs)]]


def _talks(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """Several questions on one compressed context."""
    setting = go.setting
    talks = [dialogue(setting.encoder, example) for example in batch]
    end = setting.encoder.tokenizer.eos_token_id
    first, forcing = batch[0], go.forcing(batch)
    talk = Conversation(talks, first.history, first.recompress, setting.protocol, end, setting.model.device, forcing)
    members, took = go.answered(talk)

    def rows_of(i: int, _: Member) -> list[dict[str, Any]]:
        heard = [one for question in talk.heard if isinstance(one := question[i], Generation)]
        costs = go.spent(i, heard[-1].reports, talk.timings(took.prompt))
        found = [
            rows.talked(setting, *one, row, heard) for row, one in enumerate(zip(batch, talks, costs, strict=True))
        ]
        return rows.with_forced(found, forcing.of(i) if forcing else ())

    return go.each(members, rows_of)


def _texts(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """Texts that are fed as they stand: the mean loss of the tokens that count, in nats."""
    setting = go.setting
    plans = [example.forced for example in batch if example.forced is not None]
    pieces = [setting.encoder.piece(plan) for plan in plans]
    text = Text(pieces, plans[0], [number_of(example) for example in batch], setting.model.device)
    members, took = go.through(text)
    timings = text.timings(*took)

    def rows_of(i: int, member: Member) -> list[dict[str, Any]]:
        costs = go.spent(i, member.cache.reports(), timings)
        return rows.predicted(setting, batch, pieces, text.losses[member], timings.n_prompt, costs)

    return go.each(members, rows_of)


def _choices(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """Ways to go on, compared by their likelihood after the compressed prompt."""
    setting = go.setting
    asked = [[encode(setting.encoder, example, choice) for choice in example.choices] for example in batch]
    choices = Choices(
        asked, [number_of(example) for example in batch], setting.protocol, batch[0].stride, setting.pad_id
    )
    members, took = go.through(choices)

    def rows_of(i: int, member: Member) -> list[dict[str, Any]]:
        costs = go.spent(i, choices.reports(member.cache), choices.timings(*took))
        likelihoods = choices.likelihoods[member]
        return [rows.compared(setting, *one) for one in zip(batch, asked, likelihoods, costs, strict=True)]

    return go.each(members, rows_of)


def _timed(go: Pass, batch: Sequence[Example]) -> list[RowsOrError]:
    """Random tokens that are read and decoded with a method alone and, in turns, with the full cache."""
    setting, ((method,), (example,)) = go.setting, (go.methods, batch)
    what = example.timed
    assert what is not None
    full = _full_like([method])
    methods = [method] if method.name == full.name else [method, full]
    ours, *others = measure(setting.model, methods, what, setting.chunk)
    timings = Timings(ours.prompt, 0.0, ours.step * what.steps, what.length * what.batch, what.steps)
    assert ours.ledger is not None
    (costs,) = go.spent(0, [ours.ledger.per(what.batch)], timings)
    return [[rows.timed(example, ours, others[0] if others else None, costs)]]


_BY_KIND: dict[str, Callable[[Pass, Sequence[Example]], list[RowsOrError]]] = {
    "answer": _answers,
    "beams": _beams,
    "turns": _talks,
    "forced": _texts,
    "choices": _choices,
    "timed": _timed,
}
