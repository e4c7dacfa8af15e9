"""Teacher forcing through a compressed cache: how well each token of a text is predicted when all are given.

A loss at place t means something for a compressed cache only if the query of token t - 1 attended to what compression
had left. A pass over the whole text at once computes all attention before anything is dropped or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runners.engine.generation import MakesCache, Reading, Timings, through
from runners.engine.session import Member, Session, State
from tasks.base import Forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def force(
    model: PreTrainedModel, method: MakesCache, pieces: Sequence[Sequence[int]], forced: Forced, samples: Sequence[int]
) -> tuple[Tensor, Any, Timings]:
    """Losses of a batch of pieces of equal length, the cache they were made with, and the time it took.

    Losses are negative log-likelihoods in nats, [B, L], float32; NaN where the protocol predicts nothing. The step
    that computes one sees the cache after compression, except in `one_pass` and in the first block of `chunk`.
    """
    text = Text(pieces, forced, samples, model.device)
    state, took = through(model, [method], text)
    (member,) = state.members
    return text.losses[member], member.cache, text.timings(*took)


class Text:
    """A batch of pieces on its way through a state: `first` of their tokens as the prompt, then blocks.

    ids [B, L].  losses: what each cache that neither failed nor ended has found.
    """

    def __init__(self, pieces: Sequence[Sequence[int]], forced: Forced, samples: Sequence[int], device: torch.device):
        self.samples = samples
        self.losses: dict[Member, Tensor] = {}
        self.ids = torch.tensor([list(piece) for piece in pieces], device=device)
        self.forced, n = forced, self.ids.shape[1]
        # what is predicted behind the last token has no target; a block of `chunk` is still compressed with it
        self.last = n if forced.through == "chunk" else n - 1
        begins = forced.stride if forced.through in ("chunk", "one_pass") else forced.prompt - 1
        self.first = min(begins, self.last)

    def reading(self, chunk: int | None) -> Reading:
        """The prompt in one pass, whatever the chunk."""
        return Reading(self._begin, None)

    def _begin(self, session: Session) -> Tensor:
        """Feed the prompt; losses [B, L], filled in as far as its own predictions count."""
        losses = torch.full(self.ids.shape, torch.nan, device=self.ids.device)
        n = self.first
        inside = self.forced.counted[0] <= n
        logits = session.run(self.ids[:, :n], every=inside)
        if inside:
            losses[:, 1 : n + 1] = _losses(logits, self.ids[:, 1 : n + 1])
        return losses

    def go_on(self, state: State, outputs: Tensor) -> None:
        """Feed the rest, and fill in its losses [caches * B, L]."""
        targets = self.ids.repeat(len(outputs) // len(self.ids), 1)
        again = self.forced.through == "chunk"
        for a in range(self.first, self.last, self.forced.stride):
            b = min(a + self.forced.stride, self.last)
            logits = state.run(self.ids[:, a:b], ends_prompt=again, every=True)
            outputs[:, a + 1 : b + 1] = _losses(logits, targets[:, a + 1 : b + 1])
        self.losses = dict(zip(state.active, outputs.split(len(self.ids)), strict=True))

    def timings(self, prompt: float, decode: float) -> Timings:
        """Of the batch. prompt, decode: seconds."""
        return Timings(prompt, 0.0, decode, n_prompt=self.first * len(self.ids), steps=self.last - self.first)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [B, T] of targets [B, T] from logits [B, T or more, V]; float32, a few hundred places at a time."""
    losses = []
    for a in range(0, targets.shape[1], 256):
        to = targets[:, a : a + 256]
        scores = logits[:, a : a + to.shape[1]].float().log_softmax(-1)
        losses.append(-scores.gather(-1, to[..., None])[..., 0])
    return torch.cat(losses, dim=1) if losses else torch.empty_like(targets, dtype=torch.float32)
