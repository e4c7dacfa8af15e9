"""Hindsight: keep what the full cache's own answer attends to, a ceiling for what ranks slots by attention.

Paper: none; a reference row. Dropping slots changes deeper layers, and codes or merged slots may do better.
Idea:  the answer of the full cache is read behind the prompt. A slot's score is the attention that it gets from the
       answer's tokens, summed over them and over a group's heads; the best of each KV head stay, and then the answer
       is given anew.
Here:  a run answers by the full cache first (`needs` answers), alone; so no time of it means anything. At equal scores
       the older slot stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from kernels import mass
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import NotHere, UserError
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.probe import attend_beside
from methods.core.store import Store

if TYPE_CHECKING:
    from methods.core.cache import KVCache


@dataclass
class Hindsight(Eviction):
    """Score slots by the attention of the answer that will be given."""

    needs: ClassVar[frozenset[str]] = frozenset({"answers"})
    changes_prompt: ClassVar[bool] = True  # its pass over the prompt comes behind an answer of its own
    fills_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store is not None:
            raise UserError(
                "Hindsight: method.store; its slots are chosen once the prompt has been stored, leave it out"
            )

        if self.interval is not None:
            raise NotHere(
                "method.decode: Hindsight knows what an answer attends to of its prompt, and has no score for a cut "
                "while decoding; leave it out"
            )

    @property
    def family(self) -> str:
        return "baseline"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [HindsightCache(self, prompt_len) for _ in range(spec.n_layers)]

    def after_prompt(self, model: nn.Module, cache: KVCache) -> None:
        """Read the answers behind the prompt, once; then every layer decides."""
        if self.request.is_off:
            return
        if cache.answers is None:
            raise UserError(f"{self.name}: a later prompt has an answer of its own, which is not known; compress once")
        ids, mask = rectangle(cache.answers)
        cache.probe(model, ids.to(cache.spec.device), mask.to(cache.spec.device))
        cache.answers = None
        for layer in cache.layers:
            layer.inner.look_back()

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The attention from the answer, [B, H, S]."""
        return store.track("foreseen")


class HindsightCache(EvictionCache):
    """One layer, which decides when the answer has been read."""

    waiting: Step | None = None  # the step that ended the prompt, without its tensors
    foreseen: Tensor | None = None  # [B, H, S]

    def probe(self, step: Step) -> Tensor:
        k = torch.cat((self.store.read()[0], step.k), dim=2)
        k_pos = torch.cat((self.store.pos, step.pos[:, None].expand(-1, step.k.shape[1], -1)), dim=2)
        received = mass(step.q, k, step.rules, q_pos=step.pos, k_pos=k_pos)[..., : len(self.store)]
        self.foreseen = received.unflatten(1, (step.k.shape[1], -1)).sum(2)
        return attend_beside(self.store, step)

    def _decide(self, step: Step) -> None:
        if step.stage is not Stage.ENDS_PROMPT or self.method.request.is_off:
            super()._decide(step)
            return
        self.waiting = replace(step, **{name: getattr(step, name)[:, :, :0] for name in ("q", "k", "v")})

    def look_back(self) -> None:
        """Drop what the answer does not attend to."""
        assert self.waiting is not None and self.foreseen is not None
        self.store.track("foreseen").copy_(self.foreseen)
        step, self.waiting, self.foreseen = self.waiting, None, None
        self._end_prompt(step)
        self.store.forget("foreseen")

    def workspace(self) -> Iterable[Tensor]:
        yield from super().workspace()
        if self.foreseen is not None:
            yield self.foreseen


def rectangle(rows: Iterable[Iterable[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens, filled up on the left: ids and mask, both [B, T]."""
    lists = [list(row) for row in rows]
    n = max(map(len, lists), default=0)
    ids = [[0] * (n - len(row)) + row for row in lists]
    mask = [[0] * (n - len(row)) + [1] * len(row) for row in lists]
    return torch.tensor(ids), torch.tensor(mask)
