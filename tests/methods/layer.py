"""One layer without a model: a step and a store made of random tensors."""

import torch

from kernels import Rules
from methods.core.contract import Stage, Step
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


def filled(n: int, kv_heads: int = 1) -> Store:
    """A store that holds the tokens of step_of(n)."""
    store, step = Store(), step_of(n, kv_heads, kv_heads)
    store.append(step.k, step.v, step.pos)
    return store
