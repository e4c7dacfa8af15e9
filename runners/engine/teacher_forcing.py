"""Teacher forcing through a compressed cache: how well each token of a text is predicted when all are given.

A loss at place t means something for a compressed cache only if the query of token t - 1 attended to what compression
had left. A pass over the whole text at once computes all attention before anything is dropped or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runners.engine.generation import MakesCache, Timings
from runners.engine.session import Session, now
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
    text = Text(pieces, forced, model.device)
    session = Session(model, method.cache_for(model, samples=samples), len(pieces))
    losses = text.begin(session)
    method.after_prompt(model, session.cache)
    prompt_done = now(model.device)
    text.go_on(session, losses)
    return losses, session.cache, text.timings(prompt_done - began, now(model.device) - prompt_done)


class Text:
    """A batch of pieces on its way through a session: `first` of their tokens as the prompt, then blocks.

    ids [B, L].
    """

    def __init__(self, pieces: Sequence[Sequence[int]], forced: Forced, device: torch.device):
        self.ids = torch.tensor([list(piece) for piece in pieces], device=device)
        self.forced, n = forced, self.ids.shape[1]
        # the last token's own prediction is nobody's loss; a block of `chunk` is still compressed with it
        self.last = n if forced.through == "chunk" else n - 1
        begins = forced.stride if forced.through in ("chunk", "one_pass") else forced.prompt - 1
        self.first = min(begins, self.last)

    def begin(self, session: Session) -> Tensor:
        """Feed the prompt; losses [B, L], filled in as far as its own predictions count."""
        losses = torch.full(self.ids.shape, torch.nan, device=self.ids.device)
        n = self.first
        inside = self.forced.counted[0] <= n
        logits = session.run(self.ids[:, :n], every=inside)
        if inside:
            losses[:, 1 : n + 1] = _losses(logits, self.ids[:, 1 : n + 1])
        return losses

    def go_on(self, session: Session, losses: Tensor) -> None:
        """Feed the rest, and fill in its losses [rows, L]; a session with more rows reads the batch again and again."""
        ids = self.ids.repeat(len(losses) // len(self.ids), 1)
        again = self.forced.through == "chunk"
        for a in range(self.first, self.last, self.forced.stride):
            b = min(a + self.forced.stride, self.last)
            logits = session.run(ids[:, a:b], ends_prompt=again, every=True)
            losses[:, a + 1 : b + 1] = _losses(logits, ids[:, a + 1 : b + 1])

    def timings(self, prompt: float, decode: float) -> Timings:
        return Timings(prompt, 0.0, decode, n_prompt=self.first * len(self.ids), steps=self.last - self.first)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [B, T] of targets [B, T] from logits [B, T or more, V]; float32, a few hundred places at a time."""
    found = []
    for a in range(0, targets.shape[1], 256):
        to = targets[:, a : a + 256]
        scores = logits[:, a : a + to.shape[1]].float().log_softmax(-1)
        found.append(-scores.gather(-1, to[..., None])[..., 0])
    return torch.cat(found, dim=1) if found else torch.empty_like(targets, dtype=torch.float32)
