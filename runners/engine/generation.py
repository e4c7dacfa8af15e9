"""Answers over a compressed cache: the prompt in chunks, then the question, then the decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from methods import load_method
from methods.core.contract import Method
from methods.core.meter import Report
from runners.engine.fidelity.forcing import Forcing
from runners.engine.new_tokens import Answer, Draw, Limits, Stops
from runners.engine.session import Generation, Session, State, now
from runners.engine.shared_prefill import Group
from runners.engine.time_limit import TimeLimit, within
from tasks.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    ids: token ids of context and question, tokenized as one string.
    n_context: tokens of the context; under `protocol=query_agnostic` only these are compressed.
    ends, stops: token ids and strings that end the generation, after `min_new_tokens`.
    sample: a number that identifies the sample; a method's randomness and that of the answer are keyed by it.
    spans: its parts by name (methods.core.contract.SPANS): the first token and the one behind the last.
    begins: the answer's first tokens, which are given: each is fed behind the prompt in a pass of its own.
    held: under `protocol=query_aware` the last token is fed after compression, as before choices (choices.py).
    """

    ids: Sequence[int]
    n_context: int
    max_new_tokens: int
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()
    sample: int = 0
    held: bool = False
    stops: Stops | None = None
    sampling: Sampling = GREEDY
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    begins: tuple[int, ...] = ()

    @property
    def limits(self) -> Limits:
        """When the first of its answers ends."""
        return self.limits_of(0)

    def limits_of(self, repeat: int) -> Limits:
        """When one of its answers ends, and how that is drawn."""
        draw = Draw(self.sampling, self.sample, repeat) if self.sampling.temperature else None
        return Limits(self.max_new_tokens, self.min_new_tokens, self.ends, self.stops, draw)

    def parts(self, protocol: str) -> tuple[list[int], list[int]]:
        """What is compressed, and what is fed afterwards."""
        ids = list(self.ids)
        if protocol == "aware" and not (self.held and len(ids) > 1):
            return ids, []
        if protocol == "aware":
            return ids[:-1], ids[-1:]
        # the first new token needs a token that is fed after compression, and compression needs a context
        cut = max(1, min(self.n_context, len(ids) - 1))
        return ids[:cut], ids[cut:]


@dataclass(frozen=True)
class Timings:
    """Seconds of one batch; choosing the first token is part of the decoding.

    n_prompt: tokens that were compressed, in all rows, padding left out.
    steps: passes of the decoding loop, each one token for every row.
    """

    prompt: float
    question: float
    decode: float
    n_prompt: int
    steps: int

    @property
    def total(self) -> float:
        """Seconds of the batch in all."""
        return self.prompt + self.question + self.decode


class MakesCache(Protocol):
    """A method, or anything else that gives a transformers Cache for one batch."""

    def cache_for(self, model: Any, prompt_len: int | None = None, samples: Sequence[int] | None = None) -> Any:
        """As `Method.cache_for`."""
        ...


class Reading(NamedTuple):
    """How the prompts of a batch are read: fed to a session, which gives a tensor of a row each.

    prompt_len: as for `Method.caches`.
    """

    read: Callable[[Session], Tensor]
    prompt_len: int | None


def in_chunks(prompts: Sequence[Sequence[int]], chunk: int | None) -> Reading:
    """Prompts in passes of so many tokens, None: in one; it gives the logits after them, [B, V]."""
    n = max(map(len, prompts))
    several = chunk is not None and chunk < n
    return Reading(lambda session: session.feed(prompts, chunk if several else None), n if several else None)


class Plan(Protocol):
    """A batch of one kind of example: what of it is compressed, and what follows.

    samples: numbers of its samples, a row of the prompts each.
    """

    @property
    def samples(self) -> Sequence[int]:
        """Numbers of the samples, one per row of the prompts."""
        ...

    def reading(self, chunk: int | None) -> Reading:
        """How the prompts are read, in passes of `chunk` tokens, None: in one."""
        ...

    def go_on(self, state: State, outputs: Tensor) -> None:
        """All that follows behind the prompts; outputs: what reading them gave, once for every cache."""
        ...


def given_with(plan: Plan, method: Any) -> dict[str, Any]:
    """What else a method needs to be given with its cache, as far as a plan has it."""
    named = {"spans": getattr(plan, "spans", None), "answers": getattr(plan, "answers", None)}
    return {name: value for name, value in named.items() if name in getattr(method, "needs", ())}


def foreseen(
    model: PreTrainedModel, method: Any, prompts: Sequence[Prompt], chunk: int | None, pad_id: int
) -> list[list[int]] | None:
    """What the full cache answers, for a method that looks ahead at it."""
    if "answers" not in getattr(method, "needs", ()):
        return None
    full = load_method("full").holding_in(method.cache_dtype)
    return [answer.ids for answer in generate(model, full, prompts, chunk=chunk, pad_id=pad_id)[0]]


class Took(NamedTuple):
    """Seconds until all prompts were compressed, and from then to the end."""

    prompt: float
    rest: float


@torch.inference_mode()
def through(
    model: PreTrainedModel,
    methods: Sequence[Any],
    plan: Plan,
    chunk: int | None = None,
    pad_id: int = 0,
    limit: float | None = None,
    shared: bool = False,
) -> tuple[State, Took]:
    """A batch on its way through one method's cache or, `shared`, through those of all methods at once.

    Shared, the prompts are read once, a method's error is kept with it, and what concerns all of them is raised, such
    as OutOfMemoryError; methods that change the prompt cannot share it. A method alone has its errors raised.
    methods: Methods, or alone anything that makes a cache.
    limit: seconds until those that have not ended fail with TimeLimit, which are looked at behind the prompts.
    """
    assert shared or len(methods) == 1, "several methods share their prompts"
    assert not (shared and any(method.changes_prompt for method in methods)), "what changes the prompt runs alone"
    began = now(model.device)
    reading = plan.reading(chunk)
    state: State
    if shared:
        read, n = reading.read, reading.prompt_len
        state, outputs = Group.begin(model, methods, plan.samples, read, n, pad_id, getattr(plan, "spans", None))
    else:
        given = given_with(plan, methods[0])
        state, outputs = _alone(model, methods[0], plan.samples, reading, pad_id, given)
    prompt_done = now(model.device)
    with _limited(state, limit, prompt_done - began):
        if state.active:
            plan.go_on(state, outputs)
    return state, Took(prompt_done - began, now(model.device) - prompt_done)


def _alone(
    model: PreTrainedModel,
    method: MakesCache,
    samples: Sequence[int],
    reading: Reading,
    pad_id: int,
    given: Mapping[str, Any],
) -> tuple[Session, Tensor]:
    cache = method.cache_for(model, prompt_len=reading.prompt_len, samples=samples, **given)
    session = Session(model, cache, len(samples), pad_id)
    outputs = reading.read(session)
    return session, outputs


@contextlib.contextmanager
def _limited(state: State, seconds: float | None, spent: float) -> Iterator[None]:
    """Inside the block all that have not ended fail with TimeLimit once the time is up. spent: seconds before."""
    try:
        with within(state.model, seconds, spent):
            yield
    except TimeLimit as error:
        for member in state.members:
            member.late(error)


class Prompts:
    """A batch of prompts with one question each.

    repeats: answers per prompt, which all begin at the same compressed cache.
    heard: per repeat what each cache answered.  forcing: the forced half of the first of them.  answers: what the full
    cache goes on with, of each row, where the method needs it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        protocol: str,
        repeats: int = 1,
        forcing: Forcing | None = None,
        answers: Sequence[Sequence[int]] | None = None,
    ):
        self.prompts, self.repeats, self.forcing, self.answers = prompts, repeats, forcing, answers
        parts = [prompt.parts(protocol) for prompt in prompts]
        self.firsts, self._rests = [first for first, _ in parts], [rest for _, rest in parts]
        self.samples, self.spans = [prompt.sample for prompt in prompts], [prompt.spans for prompt in prompts]
        self.heard: list[list[Generation | Exception]] = []
        self._fed = [bool(rest or prompt.begins) for rest, prompt in zip(self._rests, prompts)]  # behind the prompt
        self._question = 0.0

    def reading(self, chunk: int | None) -> Reading:
        """How the prompts are read; see `Plan`."""
        return in_chunks(self.firsts, chunk)

    def ask(self, state: State, outputs: Tensor) -> Tensor:
        """Feed the questions, and what is given of the answers; the logits before the first token that is not."""
        outputs = state.feed(self._rests) if any(self._rests) else outputs
        for tokens in zip(*(prompt.begins for prompt in self.prompts), strict=True):
            outputs = state.run(torch.tensor(tokens)[:, None])
        return outputs

    def go_on(self, state: State, outputs: Tensor) -> None:
        """Feed the questions and decode every repeat; outputs [caches * rows, V]: the logits after the prompts."""
        began = now(state.model.device)
        outputs = self.ask(state, outputs)
        self._question = now(state.model.device) - began
        for repeat in range(self.repeats):
            limits = [prompt.limits_of(repeat) for prompt in self.prompts]
            branch, see = state if repeat + 1 == self.repeats else state.fork(), None
            if self.forcing is not None and repeat == 0:
                see = self.forcing.see
                # the first token comes from the exact prefill, unless something was fed after that
                self.forcing.hold(branch, outputs, limits, [int(not fed) for fed in self._fed])
            self.heard.append(branch.answer(outputs, limits, see=see))

    def of(self, member: int) -> list[Generation]:
        """What one cache has answered, per repeat."""
        return [one for every in self.heard if isinstance(one := every[member], Generation)]

    def timings(self, prompt: float, member: int) -> Timings:
        """Of all repeats of one cache. prompt: seconds until the prompts were compressed."""
        heard = self.of(member)
        seconds, steps = sum(one.seconds for one in heard), sum(one.steps for one in heard)
        return Timings(prompt, self._question, seconds, sum(map(len, self.firsts)), steps)


def generate(
    model: PreTrainedModel,
    method: MakesCache,
    prompts: Sequence[Prompt],
    protocol: str = "aware",
    chunk: int | None = None,
    pad_id: int = 0,
) -> tuple[list[Answer], Any, Timings]:
    """Answers of a batch, the cache they were made with, and the time it took.

    protocol: "aware" compresses context and question together; "agnostic" compresses the context and feeds the question
    as one later turn. chunk: tokens per pass over the prompt; None takes it in one.
    """
    asked = Prompts(prompts, protocol, answers=foreseen(model, method, prompts, chunk, pad_id))
    state, took = through(model, [method], asked, chunk, pad_id)
    ((one,),) = asked.heard
    assert isinstance(one, Generation) and isinstance(state, Session)
    return one.answers, state.cache, asked.timings(took.prompt, 0)


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

    Tokens and ledgers equal those of single runs; times are the group's. limit and what is raised: as in `through`.
    """
    asked = Prompts(prompts, protocol)
    state, took = through(model, methods, asked, chunk, pad_id, limit, shared=True)
    outcomes = []
    for i, member in enumerate(state.members):
        timings = asked.timings(took.prompt, i)
        answers, ledgers = ([], []) if member.error else (asked.of(i)[0].answers, asked.of(i)[0].reports)
        outcomes.append(Outcome(answers, ledgers, timings, member.error))
    return outcomes


def start(
    model: PreTrainedModel,
    method: MakesCache,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    chunk: int | None = None,
    pad_id: int = 0,
) -> tuple[Session, Tensor]:
    """A session whose prompts have been read and compressed, and the logits after them, [B, V]."""
    return _alone(model, method, samples, in_chunks(prompts, chunk), pad_id, {})
