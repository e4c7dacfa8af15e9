"""Nulls: what a score has to beat. A die or plain recency ranks the slots that are not pinned."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import uniform
from methods.core.contract import Step
from methods.core.decision import EvictionContext
from methods.core.store import Store

#: what may rank the slots in place of the method's own score
RANKS = ("own", "random", "recency", "random_in_counts")
DRAWS = ("fixed", "fresh")


def random_scores(seed: int, store: Store, step: Step, cut: EvictionContext, draw: str = "fixed") -> Tensor:
    """Uniform numbers [B, H, S], keyed by seed, sample, layer, KV head and position.

    draw: "fixed": a slot's number for good, so that what is held is a uniform sample of all slots seen; "fresh": other
    numbers at every later cut, so that old slots face each of them again.
    """
    heads = torch.arange(store.pos.shape[1], device=store.pos.device)
    layer = torch.full_like(heads[:1], step.layer)
    drawn_at = (step.pos.amax(-1)[:, None, None],) if draw == "fresh" and cut.again else ()
    return uniform(seed, step.samples[:, None, None], layer, heads[None, :, None], store.pos, *drawn_at)


def recency_scores(store: Store) -> Tensor:
    """Positions [B, H, S], float32: the newest stay."""
    return store.pos.float()
