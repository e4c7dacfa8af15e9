"""Several questions on one context as token ids: what is read first, and what is fed before every later answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from runners.engine.new_tokens import Limits
from runners.engine.prompt import Encoded, Encoder
from tasks.base import Example, Turn


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
class Dialogue:
    """first: the prompt up to the first question; without a history up to the end of the context.

    later: the questions that follow; without a history all of them.
    """

    first: Encoded
    later: list[Question]


def dialogue(encoder: Encoder, example: Example) -> Dialogue:
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
    return Dialogue(replace(encoder(replace(example, context=context)), cut=cut), later)


def _apart(encoder: Encoder, example: Example, turns: Sequence[Turn]) -> Dialogue:
    longest = max(turns, key=lambda turn: len(encoder.plain(turn.question)) + turn.max_new_tokens)
    context, cut = encoder.fit(replace(example, question=longest.question), longest.max_new_tokens)
    wrap, shared = encoder.chats(example), context
    later = []
    for i, turn in enumerate(turns):
        text, split = context + turn.question, len(context)
        if wrap:
            text, split = encoder.wrap(text, split, example.shots)
        shared, ids = text[:split], encoder.plain(text[split:])
        limits = encoder.limits(example, turn.max_new_tokens, example.min_new_tokens, i)
        later.append(Question(ids, ids, limits))
    ids = encoder.plain(shared) if wrap else [*encoder.opening, *encoder.plain(shared)]
    return Dialogue(encoder.encoded(example, ids, len(ids), cut), later)


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
