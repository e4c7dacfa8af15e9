"""Teacher forcing through a compressed cache: how well each token of a text is predicted when all are given.

A loss at place t means something for a compressed cache only if the query of token t - 1 attended to what compression
had left. A pass over the whole text at once computes all attention before anything is dropped or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runners.generate import MakesCache, Timings
from runners.session import Session, now
from tasks.base import Forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def force(
    model: PreTrainedModel, method: MakesCache, pieces: Sequence[Sequence[int]], forced: Forced, samples: Sequence[int]
) -> tuple[Tensor, Any, Timings]:
    """Losses of a batch of pieces of equal length, the cache they were made with, and the time it took.

    Losses are negative log-likelihoods in nats, [B, L], float32; NaN where the protocol predicts nothing. The step
    that computes one sees the cache after compression, except in `one_pass` and in the first block of `chunk`.
    """
    began = now(model.device)
    ids = torch.tensor([list(piece) for piece in pieces], device=model.device)  # [B, L]
    losses = torch.full(ids.shape, torch.nan, device=model.device)
    n = ids.shape[1]
    # the last token's own prediction is nobody's loss; a block of `chunk` is still compressed with it
    last = n if forced.through == "chunk" else n - 1
    first = min(forced.stride if forced.through in ("chunk", "one_pass") else forced.prompt - 1, last)
    inside = forced.counted[0] <= first  # some of the prompt's own predictions count
    session = Session(model, method.cache_for(model, samples=samples), len(pieces))
    logits = session.run(ids[:, :first], every=inside)
    method.after_prompt(model, session.cache)
    if inside:
        losses[:, 1 : first + 1] = _losses(logits, ids[:, 1 : first + 1])
    prompt_done = now(model.device)
    for a in range(first, last, forced.stride):
        b = min(a + forced.stride, last)
        logits = session.run(ids[:, a:b], ends_prompt=forced.through == "chunk", every=True)
        losses[:, a + 1 : b + 1] = _losses(logits, ids[:, a + 1 : b + 1])
    timings = Timings(
        prompt=prompt_done - began,
        question=0.0,
        decode=now(model.device) - prompt_done,
        n_prompt=first * len(pieces),
        steps=last - first,
    )
    return losses, session.cache, timings


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [B, T] of targets [B, T] from logits [B, T or more, V]; float32, a few hundred places at a time."""
    found = []
    for a in range(0, targets.shape[1], 256):
        to = targets[:, a : a + 256]
        scores = logits[:, a : a + to.shape[1]].float().log_softmax(-1)
        found.append(-scores.gather(-1, to[..., None])[..., 0])
    return torch.cat(found, dim=1) if found else torch.empty_like(targets, dtype=torch.float32)
