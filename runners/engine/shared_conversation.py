"""Several questions on one context, asked one after the other of one cache or of many that read it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from runners.engine.conversation import Dialogue, Question
from runners.engine.generation import Timings
from runners.engine.new_tokens import Answer, Limits
from runners.engine.session import Heard, State, now

Found = TypeVar("Found")


class Talk:
    """The questions of a batch.

    history, recompress: of its examples; see tasks/base.py.  ends: the token of an answer that does not end with one.
    firsts: what is read and compressed, a row per example.
    heard: per question what each cache made of it.
    """

    def __init__(
        self,
        talks: Sequence[Dialogue],
        history: str,
        recompress: bool,
        protocol: str,
        ends: int | None,
        device: torch.device,
    ):
        self.talks, self.history, self.recompress, self.ends, self.device = talks, history, recompress, ends, device
        prompts = [talk.first.prompt for talk in talks]
        parts = [(list(prompt.ids), []) if history == "none" else prompt.parts(protocol) for prompt in prompts]
        self.firsts, self._rests = [first for first, _ in parts], [rest for _, rest in parts]
        self.samples = [prompt.sample for prompt in prompts]
        self.heard: list[list[Heard | Exception]] = []
        self._seconds = {"question": 0.0, "decode": 0.0}

    def go_on(self, state: State, logits: Tensor) -> None:
        """Ask all questions of a state behind the prompts; logits: after these. Nothing can be asked afterwards."""
        later = list(zip(*(talk.later for talk in self.talks)))
        if self.history == "none":
            for i, asked in enumerate(later):
                own = state if i + 1 == len(later) else state.fork()
                self._answer(own, self._feed(own, [one.golden for one in asked]), [one.limits for one in asked])
            return
        if any(self._rests):
            logits = self._timed("question", lambda: state.feed(self._rests))
        limits = [talk.first.prompt.limits for talk in self.talks]
        for asked in later:
            # the next question finds the reference, unless it is to find what is generated now
            self._answer(state if self.history == "own" else state.fork(), logits, limits)
            logits, limits = self._feed(state, self._parts(asked)), [one.limits for one in asked]
        self._answer(state, logits, limits)

    def timings(self, prompt: float) -> Timings:
        steps = sum(max((one.steps for one in heard if isinstance(one, Heard)), default=0) for heard in self.heard)
        return Timings(prompt=prompt, n_prompt=sum(map(len, self.firsts)), steps=steps, **self._seconds)

    def _parts(self, asked: Sequence[Question]) -> list[list[int]]:
        if self.history == "golden":
            return [one.golden for one in asked]
        (heard,) = self.heard[-1]
        assert isinstance(heard, Heard)
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
        # behind an answer that stays nothing may be fed that is no part of it
        own = self.history == "own"
        self.heard.append(self._timed("decode", lambda: state.answer(logits, limits, exact=own)))

    def _timed(self, what: str, call: Callable[[], Found]) -> Found:
        began = now(self.device)
        found = call()
        self._seconds[what] += now(self.device) - began
        return found
