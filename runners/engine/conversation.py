"""Several questions on one context: as token ids, and asked one after the other of one cache or of many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from runners.engine.fidelity.forcing import Forcing
from runners.engine.generation import Reading, Timings, in_chunks
from runners.engine.new_tokens import Answer, Limits
from runners.engine.prompt import Encoded, Encoder, Tokenized
from runners.engine.session import Generation, State, now
from tasks.base import Example, Turn

Result = TypeVar("Result")


@dataclass(frozen=True)
class Question:
    """One question of a dialogue.

    golden: token ids from the end of the previous prompt on: the previous answer as the reference has it, the question.
    own: token ids from the end of a generated answer on.
    Without a history both are the question alone.
    """

    golden: list[int]
    own: list[int]
    limits: Limits


@dataclass(frozen=True)
class EncodedConversation:
    """first: the prompt up to the first question; without a history up to the end of the context.

    later: the questions that follow; without a history all of them.
    """

    first: Encoded
    later: list[Question]


def dialogue(encoder: Encoder, example: Example) -> EncodedConversation:
    """The example's questions, its context cut so that all of them and their answers fit into the window.

    Raises ValueError if they leave no room for context, or the chat template does not let turns be added.
    """
    turns = (Turn(example.question, example.answers, example.max_new_tokens), *example.turns)
    if example.history == "none":
        return _apart(encoder, example, turns)
    later = [
        Question(*_continued(encoder, example, before, turn), encoder.limits(example, turn.max_new_tokens, turn=i))
        for i, (before, turn) in enumerate(pairwise(turns), 1)
    ]
    new = sum(turn.max_new_tokens for turn in turns) + sum(len(question.golden) for question in later)
    context, cut = encoder.fit(example, new)
    return EncodedConversation(replace(encoder(replace(example, context=context)), cut=cut), later)


def _apart(encoder: Encoder, example: Example, turns: Sequence[Turn]) -> EncodedConversation:
    longest = max(turns, key=lambda turn: len(encoder.plain(turn.question)) + turn.max_new_tokens)
    context, cut = encoder.fit(replace(example, question=longest.question), longest.max_new_tokens)
    wrap, shared, first = encoder.chats(example), context, 0
    later = []
    for i, turn in enumerate(turns):
        text, split = context + turn.question, len(context)
        if wrap:
            text, first, split, _ = encoder.wrap(text, split, example.shots)
        shared, ids = text[:split], encoder.plain(text[split:])
        limits = encoder.limits(example, turn.max_new_tokens, example.min_new_tokens, i)
        later.append(Question(ids, ids, limits))
    ids = encoder.plain(shared) if wrap else [*encoder.opening, *encoder.plain(shared)]
    begin = len(encoder.plain(shared[:first])) if wrap else len(encoder.opening)
    made = Tokenized(ids, len(ids), {"template": (0, begin), "context": (begin, len(ids))})
    return EncodedConversation(encoder.encoded(example, made, cut), later)


def _continued(encoder: Encoder, example: Example, before: Turn, turn: Turn) -> tuple[list[int], list[int]]:
    """Token ids that lead from a question over its answer to the next question: with the reference, and without."""
    reference = before.answers[0]
    if not encoder.chats(example):
        text = f"\n\n{turn.question}"
        return encoder.plain(reference + text), encoder.plain(text)
    asked = encoder.templated((), "a")
    both = encoder.templated((("a", reference.strip()),), turn.question)
    if not both.startswith(asked + reference.strip()):
        raise ValueError("the chat template rewrites earlier turns; model.chat=false leaves it out")
    answered = both.removeprefix(asked)
    return encoder.plain(answered), encoder.plain(answered.removeprefix(reference.strip()))


class Conversation:
    """The questions of a batch.

    history, recompress: of its examples; see tasks/base.py.  ends: the token of an answer that does not end with one.
    firsts: what is read and compressed, a row per example.
    heard: per question what each cache made of it.  forcing: the forced half of the first one's answer.
    """

    def __init__(
        self,
        talks: Sequence[EncodedConversation],
        history: str,
        recompress: bool,
        protocol: str,
        ends: int | None,
        device: torch.device,
        forcing: Forcing | None = None,
    ):
        self.forcing = forcing
        self.talks, self.history, self.recompress, self.ends, self.device = talks, history, recompress, ends, device
        prompts = [talk.first.prompt for talk in talks]
        parts = [(list(prompt.ids), []) if history == "none" else prompt.parts(protocol) for prompt in prompts]
        self.firsts, self._rests = [first for first, _ in parts], [rest for _, rest in parts]
        self.samples, self.spans = [prompt.sample for prompt in prompts], [prompt.spans for prompt in prompts]
        self.heard: list[list[Generation | Exception]] = []
        self._seconds = {"question": 0.0, "decode": 0.0}

    def reading(self, chunk: int | None) -> Reading:
        """How the contexts are read; see `Plan`."""
        return in_chunks(self.firsts, chunk)

    def ask(self, state: State, outputs: Tensor) -> Tensor:
        """Feed what lies between the contexts and the first answer; the logits before that."""
        if self.history == "none":
            return state.feed([talk.later[0].golden for talk in self.talks], ends_prompt=self.recompress)
        return state.feed(self._rests) if any(self._rests) else outputs

    def go_on(self, state: State, outputs: Tensor) -> None:
        """Ask all questions of a state behind the prompts; outputs: the logits after these. Then none can be asked."""
        logits = outputs
        later = list(zip(*(talk.later for talk in self.talks)))
        if self.history == "none":
            for i, asked in enumerate(later):
                branch = state if i + 1 == len(later) else state.fork()
                self._answer(branch, self._feed(branch, [one.golden for one in asked]), [one.limits for one in asked])
            return
        if any(self._rests):
            logits = self._timed("question", lambda: self.ask(state, outputs))
        limits = [talk.first.prompt.limits for talk in self.talks]
        for asked in later:
            # the next question finds the reference, unless it is to find what is generated now
            self._answer(state if self.history == "own" else state.fork(), logits, limits)
            logits, limits = self._feed(state, self._parts(asked)), [one.limits for one in asked]
        self._answer(state, logits, limits)

    def timings(self, prompt: float) -> Timings:
        """Of all questions. prompt: seconds until the contexts were compressed."""
        steps = sum(max((one.steps for one in heard if isinstance(one, Generation)), default=0) for heard in self.heard)
        return Timings(prompt=prompt, n_prompt=sum(map(len, self.firsts)), steps=steps, **self._seconds)

    def _parts(self, asked: Sequence[Question]) -> list[list[int]]:
        if self.history == "golden":
            return [one.golden for one in asked]
        (heard,) = self.heard[-1]
        assert isinstance(heard, Generation)
        return [self._since(answer, one.own) for answer, one in zip(heard.answers, asked, strict=True)]

    def _since(self, answer: Answer, question: list[int]) -> list[int]:
        """What follows an answer that stays in the cache: its last token, which was not fed, its end, the question."""
        last = answer.ids[-1:]
        if answer.stop != "end":
            return [*last, *([] if self.ends is None or self.ends in question[:1] else [self.ends]), *question]
        return [*last, *(question[1:] if question[:1] == last else question)]

    def _feed(self, state: State, parts: Sequence[Sequence[int]]) -> Tensor:
        return self._timed("question", lambda: state.feed(parts, ends_prompt=self.recompress))

    def _answer(self, state: State, logits: Tensor, limits: Sequence[Limits]) -> None:
        see = None
        if self.forcing is not None and not self.heard:
            see = self.forcing.see
            exact_prefill = [int(self.history != "none" and not rest) for rest in self._rests]
            self.forcing.hold(state, logits, limits, exact_prefill)
        # behind an answer that stays nothing may be fed that is no part of it
        exact = self.history == "own"
        self.heard.append(self._timed("decode", lambda: state.answer(logits, limits, exact=exact, see=see)))

    def _timed(self, what: str, call: Callable[[], Result]) -> Result:
        began = now(self.device)
        result = call()
        self._seconds[what] += now(self.device) - began
        return result
