"""Answers over a compressed cache: the prompt in chunks, then the question, then the decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from runners.engine.new_tokens import Answer, Draw, Limits, Stops
from runners.engine.session import Session, now
from tasks.base import GREEDY, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    ids: token ids of context and question, tokenized as one string.
    n_context: tokens of the context; under `protocol=agnostic` only these are compressed.
    ends, stops: token ids and strings that end the generation, after `min_new_tokens`.
    sample: a number that identifies the sample; a method's randomness and that of the answer are keyed by it.
    held: under `protocol=aware` the last token is fed after compression, as before choices (runners/engine/choices.py).
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

    @property
    def limits(self) -> Limits:
        draw = Draw(self.sampling, self.sample) if self.sampling.temperature else None
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
        return self.prompt + self.question + self.decode


class MakesCache(Protocol):
    """A method, or anything else that gives a transformers Cache for one batch."""

    def cache_for(self, model: Any, prompt_len: int | None = None, samples: Sequence[int] | None = None) -> Any: ...

    def after_prompt(self, model: Any, cache: Any) -> None: ...


@torch.inference_mode()
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
    parts = [prompt.parts(protocol) for prompt in prompts]
    samples = [prompt.sample for prompt in prompts]
    began = now(model.device)
    session, logits = start(model, method, [first for first, _ in parts], samples, chunk, pad_id)
    prompt_done = now(model.device)
    if any(rest for _, rest in parts):
        logits = session.feed([rest for _, rest in parts])
    question_done = now(model.device)
    answers = session.decode(logits, [prompt.limits for prompt in prompts])
    timings = Timings(
        prompt=prompt_done - began,
        question=question_done - prompt_done,
        decode=now(model.device) - question_done,
        n_prompt=sum(len(first) for first, _ in parts),
        steps=session.steps,
    )
    return answers, session.cache, timings


def start(
    model: PreTrainedModel,
    method: MakesCache,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    chunk: int | None = None,
    pad_id: int = 0,
) -> tuple[Session, Tensor]:
    """A session whose prompts have been read and compressed, and the logits after them, [B, V]."""
    n = max(map(len, prompts))
    in_chunks = chunk is not None and chunk < n
    cache = method.cache_for(model, prompt_len=n if in_chunks else None, samples=samples)
    session = Session(model, cache, len(prompts), pad_id)
    logits = session.feed(prompts, chunk if in_chunks else None)
    method.after_prompt(model, cache)
    return session, logits
