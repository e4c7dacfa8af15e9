"""Beam search over a compressed cache, by the library's own `generate`: every beam has rows of its own in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from methods.core.contract import Method
from runners.engine.generation import Prompt, Timings
from runners.engine.new_tokens import Answer
from runners.engine.session import now

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def search_beams(
    model: PreTrainedModel, method: Method, prompt: Prompt, beams: int, pad_id: int = 0
) -> tuple[Answer, Any, Timings]:
    """The best of `beams` answers, the search ending once so many are finished; the cache holds a row per beam.

    A stop string ends what is scored of an answer, and not the search, whose beams compete beyond it.
    """
    device = model.device
    ids = torch.tensor([list(prompt.ids)], device=device)
    cache = method.cache_for(model, samples=[prompt.sample] * beams)
    passes: list[float] = []
    hook = model.register_forward_hook(lambda *_: passes.append(now(device)))
    began = now(device)
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            num_beams=beams,
            do_sample=False,
            early_stopping=True,
            max_new_tokens=prompt.max_new_tokens,
            min_new_tokens=prompt.min_new_tokens,
            eos_token_id=list(prompt.ends) or None,
            pad_token_id=pad_id,
        )
    finally:
        hook.remove()
    new = out[0, ids.shape[1] :].tolist()
    end = next((i for i, token in enumerate(new) if token in prompt.ends), None)
    answer = Answer(new, "length") if end is None else Answer(new[: end + 1], "end")
    timings = Timings(
        prompt=passes[0] - began,
        question=0.0,
        decode=now(device) - passes[0],
        n_prompt=ids.shape[1],
        steps=len(passes) - 1,
    )
    return answer, cache, timings
