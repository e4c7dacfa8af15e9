"""One layer without a model: a step and a store made of random tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels import Rules
from methods.core.contract import LayerCache, Stage, Step
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store


def step_of(
    n: int,
    heads: int = 1,
    kv_heads: int = 1,
    dim: int = 8,
    rows: int = 1,
    stage: Stage = Stage.ENDS_PROMPT,
    start: int = 0,
) -> Step:
    """A step of n tokens at positions start, start + 1, …"""
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(rows, h, n, dim, generator=g) for h in (heads, kv_heads, kv_heads))
    pos = torch.arange(start, start + n, dtype=torch.int32).expand(rows, -1)
    seen = torch.full((rows,), start, dtype=torch.int32)
    return Step(0, 1, stage, q, k, v, pos, seen, False, torch.arange(rows), Rules(dim**-0.5))


def context(store: Store, step: Step, kept: int, **fields: Any) -> EvictionContext:
    """The decision to keep so many slots per head of what the store holds; fields: more of the context's."""
    rows, slots = len(store.pos), torch.full((len(store.pos), 1, 1), kept)
    fields = {"q": step.q, "q_pos": step.pos, "real": store.pos >= 0, "prompt": [len(store)] * rows} | fields
    return EvictionContext(kept_per_head=[kept] * rows, budget_slots=slots, **fields)


def ranked(method: Eviction, store: Store, step: Step, cut: EvictionContext) -> Tensor:
    """The method's scores [B, H, S], +inf for what is pinned."""
    scores, pinned = method.score(store, step, cut), method.pinned(store, step, cut)
    return scores if pinned is None else scores.masked_fill(pinned, torch.inf)


def filled(n: int, kv_heads: int = 1) -> Store:
    """A store that holds the tokens of step_of(n)."""
    store, step = Store(), step_of(n, kv_heads, kv_heads)
    store.append(step.k, step.v, step.pos)
    return store


def scripted(
    rows: list[list[dict[int, float]]], start: int = 0, stage: Stage = Stage.ENDS_PROMPT, dim: int = 16
) -> Step:
    """A step of one row and one KV head whose attention is rows[query head][token][position], as far as it is stored.

    A query without an entry attends to all it sees alike. Key j is the j-th unit vector, so that q holds the logits.
    """
    n = len(rows[0])
    step = step_of(n, heads=len(rows), dim=dim, stage=stage, start=start)
    step.k = torch.eye(dim)[start : start + n].expand(1, 1, -1, -1).clone()
    step.q = torch.zeros(1, len(rows), n, dim)
    for h, tokens in enumerate(rows):
        for t, row in enumerate(tokens):
            for pos, p in row.items():
                step.q[0, h, t, pos] = math.log(p)
    step.rules = Rules(1.0)
    return step


def kept_after(layer: LayerCache, step: Step) -> list[int]:
    """Positions that the layer holds after the step, ascending."""
    layer.append(step)
    layer.attend(step)
    layer.end_step(step)
    pos = layer.store.pos[0, 0]
    return sorted(pos[pos >= 0].tolist())


class Spec:
    """A model of one layer, as far as `Method.caches` looks."""

    n_layers = 1
