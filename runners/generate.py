"""Greedy decoding over a compressed cache: the prompt in chunks, left-padded batches, rows that end on their own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# decode steps between two looks at whether all rows have ended: away from the CPU each look waits for the device
LOOK_EVERY = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    ids: token ids of context and question, tokenized as one string.
    n_context: tokens of the context; under `protocol=agnostic` only these are compressed.
    ends: token ids that end the generation, after `min_new_tokens`.
    sample: a number that identifies the sample; a method's randomness is keyed by it.
    """

    ids: Sequence[int]
    n_context: int
    max_new_tokens: int
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()
    sample: int = 0


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


@dataclass(frozen=True)
class Answer:
    """One row's new tokens, the one that ended it included.

    stop: "end" for an end token, "length" for max_new_tokens.
    error: why the tokens mean nothing, such as a NaN in the logits.
    """

    ids: list[int]
    stop: str
    error: str | None = None


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
    device = model.device
    ids, mask, pos, n_prompt = _layout(prompts, protocol, pad_id)
    ids, mask, pos = ids.to(device), mask.to(device), pos.to(device)
    padded = len(prompts) > 1  # a single row has no padding, and models are faster without a mask
    in_chunks = chunk is not None and chunk < n_prompt
    cache = method.cache_for(
        model, prompt_len=n_prompt if in_chunks else None, samples=[prompt.sample for prompt in prompts]
    )
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def forward(a: int, b: int, new: Tensor) -> Tensor:
        """Logits after the last of the tokens a..b, [B, V]."""
        out = model(
            input_ids=new,
            attention_mask=mask[:, :b] if padded else None,
            position_ids=pos[:, a:b],
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        return out.logits[:, -1]

    began = _now(device)
    width = chunk if in_chunks and chunk else n_prompt
    for a in range(0, n_prompt, width):
        b = min(a + width, n_prompt)
        logits = forward(a, b, ids[:, a:b])
    method.after_prompt(model, cache)
    prompt_done = _now(device)
    n = ids.shape[1]
    if n > n_prompt:
        logits = forward(n_prompt, n, ids[:, n_prompt:])
    question_done = _now(device)
    rows = _Rows(prompts, device)
    new = rows.take(logits)
    steps = 0
    look_every = LOOK_EVERY.get(device.type, 1)
    while steps < rows.most - 1:
        if steps % look_every == 0 and rows.all_done():
            break
        logits = forward(n, n + 1, new[:, None])
        new = rows.take(logits)
        n += 1
        steps += 1
    answers = rows.answers()
    timings = Timings(
        prompt=prompt_done - began,
        question=question_done - prompt_done,
        decode=_now(device) - question_done,
        n_prompt=sum(len(_parts(prompt, protocol)[0]) for prompt in prompts),
        steps=steps,
    )
    return answers, cache, timings


class _Rows:
    """The new tokens of a batch, and which rows have ended, without waiting for the device."""

    def __init__(self, prompts: Sequence[Prompt], device: torch.device):
        self.prompts = prompts
        self.most = max(prompt.max_new_tokens for prompt in prompts)
        width = max(1, *(len(prompt.ends) for prompt in prompts))
        ends = [[*prompt.ends, *[-1] * (width - len(prompt.ends))] for prompt in prompts]
        self.ends = torch.tensor(ends, device=device)  # [B, E], filled up with -1
        self.limit = torch.tensor([prompt.max_new_tokens for prompt in prompts], device=device)
        self.least = [prompt.min_new_tokens for prompt in prompts]
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.broken = torch.zeros_like(self.done)
        self.tokens: list[Tensor] = []

    def take(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B], from logits [B, V]."""
        taken = len(self.tokens)
        if taken < max(self.least):
            logits = logits.clone()
            for row, least in enumerate(self.least):
                if taken < least:
                    logits[row, list(self.prompts[row].ends)] = -torch.inf
        best, token = logits.max(dim=-1)
        self.broken |= best.isnan() & ~self.done
        self.tokens.append(token)
        self.done |= (token[:, None] == self.ends).any(dim=-1) | (taken + 1 >= self.limit)
        return token

    def all_done(self) -> bool:
        return bool((self.done | self.broken).all())

    def answers(self) -> list[Answer]:
        tokens = torch.stack(self.tokens, dim=1).tolist()
        broken = self.broken.tolist()
        answers = []
        for row, prompt in enumerate(self.prompts):
            ids = tokens[row][: prompt.max_new_tokens]
            end = next((i for i, token in enumerate(ids) if token in prompt.ends), None)
            error = "the logits hold a NaN" if broken[row] else None
            if end is None:
                answers.append(Answer(ids, "length", error))
            else:
                answers.append(Answer(ids[: end + 1], "end", error))
        return answers


def _layout(prompts: Sequence[Prompt], protocol: str, pad_id: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The batch as rectangles: ids [B, L], mask and positions [B, L + new], and the columns of the prompt.

    Rows are padded on the left; under "agnostic" contexts and questions each are, so that both parts end together.
    """
    parts = [_parts(prompt, protocol) for prompt in prompts]
    n_prompt = max(len(context) for context, _ in parts)
    n_question = max(len(question) for _, question in parts)
    new = max(prompt.max_new_tokens for prompt in prompts)
    ids, mask = [], []
    for context, question in parts:
        a, b = n_prompt - len(context), n_question - len(question)
        ids.append([pad_id] * a + context + [pad_id] * b + question)
        mask.append([0] * a + [1] * len(context) + [0] * b + [1] * len(question) + [1] * new)
    mask_ = torch.tensor(mask)
    return torch.tensor(ids), mask_, (mask_.cumsum(-1) - 1).clamp(min=0), n_prompt


def _parts(prompt: Prompt, protocol: str) -> tuple[list[int], list[int]]:
    """What is compressed, and what is fed afterwards."""
    ids = list(prompt.ids)
    if protocol == "aware":
        return ids, []
    # the first new token needs a token that is fed after compression, and compression needs a context
    cut = max(1, min(prompt.n_context, len(ids) - 1))
    return ids[:cut], ids[cut:]


def _now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
