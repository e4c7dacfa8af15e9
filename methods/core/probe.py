"""Passes over extra tokens on top of a cache, which sees them and stores nothing: reconstruction, questions, trials."""

from __future__ import annotations

from torch import Tensor

from kernels import attend_with_lse, merged
from methods.core.contract import Step
from methods.core.store import Store


def attend_beside(store: Store, step: Step) -> Tensor:
    """Output [B, Hq, T, Dv] of the step's queries over the store's slots and the step's own tokens, in one softmax."""
    old = attend_with_lse(step.q, *store.read(), step.rules, q_pos=step.pos, k_pos=store.pos, **store.weights())
    own = attend_with_lse(step.q, step.k, step.v, step.rules, q_pos=step.pos, k_pos=step.pos[:, None])
    return merged(*old, *own)
