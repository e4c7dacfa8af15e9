"""One layer that holds every slot, and whose queries pick those that they attend to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels import attend_chosen, reads
from methods.core.budget import share
from methods.core.contract import Holding, LayerCache, Stage, Step
from methods.core.selecting.method import Selective
from methods.core.store import Store, spare


class SelectiveCache(LayerCache):
    """One layer under a Selective: append, pick, attend to what was picked.

    A subclass fills in `observe` and `pick`, and lists what it holds for them in `tensors` and `holding`. A sliding
    layer holds and reads its window.
    """

    def __init__(self, method: Selective, prompt_len: int | None):
        self.method = method
        self.store = Store(prompt_len)
        self.tokens: list[int] = []  # of each row's prompt, once it has ended
        self.sees: int | None = None  # slots of a head that the next query of a sliding layer can see

    def observe(self, step: Step) -> None:
        """New slots are there: bring what tells slots apart up to date; nothing unless overridden."""

    def pick(self, step: Step) -> Tensor:
        """Slots [B, Hq or H, n], long, that the step's queries attend to, each once, -1: none; of a turn's tokens that
        share a pick those of the slots before them, to which their own are added."""
        raise NotImplementedError

    def attend_to(self, step: Step, at: Tensor) -> Tensor:
        """Output [B, Hq, T, Dv] over the slots at [B, Hq or H, n]; a subclass that holds them elsewhere, such as on the
        host or as factors, fetches or rebuilds them here."""
        store = self.store
        return attend_chosen(step.q, store.k, store.v, at, step.rules, q_pos=step.pos, k_pos=store.pos)

    def append(self, step: Step) -> None:
        if not self._goes_by_token(step):
            self._bring_in(step)

    def attend(self, step: Step) -> Tensor:
        if not self._goes_by_token(step):
            return self._attend(step)
        out = []
        # a token picks among slots that those before it have changed: they come one after the other
        for i in range(step.q.shape[2]):
            one = step.token(i)
            reads.next_token()
            self._bring_in(one)
            out.append(self._attend(one))
        return torch.cat(out, dim=2)

    def end_step(self, step: Step) -> None:
        if step.stage is Stage.ENDS_PROMPT:
            self.tokens = (step.pos.amax(-1) + 1).tolist()
        if (window := step.rules.window) is not None and step.stage is not Stage.PROBE:
            self.sees = window - 1
            self.store.keep_newest(self.sees, spare(window) if step.stage in (Stage.TURN, Stage.DECODE) else 0)

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def holding(self) -> Holding:
        return self.store.holding(self.sees)

    def held_bytes(self) -> list[int]:
        return self.holding().held

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """Bytes that a step may read, of so many that a full cache's would."""
        parts = [share(self.method.budget, n) for n in self.tokens] or [1.0] * len(full)
        return [math.ceil(size * part - 1e-6) for size, part in zip(full, parts, strict=True)]

    def expect(self, new: int) -> None:
        self.store.expect(new)

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)
        self.tokens = [self.tokens[row] for row in rows.tolist()] if self.tokens else []

    def _goes_by_token(self, step: Step) -> bool:
        """Whether a turn's tokens come one after the other, through dense layers too, as they would while decoding."""
        return step.stage is Stage.TURN and self.method.turn == "per_token" and not self.method.request.is_off

    def _picks(self, step: Step) -> bool:
        """Whether the step's queries attend to what they pick, and not to everything."""
        after = step.stage is Stage.DECODE or (step.stage is Stage.TURN and self.method.turn != "dense")
        return after and self.may_pick(step)

    def may_pick(self, step: Step) -> bool:
        """Whether the layer ever picks."""
        return step.layer >= self.method.dense_layers and not self.method.request.is_off and step.rules.window is None

    def _bring_in(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)
        if self.may_pick(step):
            self.observe(step)

    def _attend(self, step: Step) -> Tensor:
        if not self._picks(step):
            return self.store.attend(step)
        store, T = self.store, step.q.shape[2]
        at = self.pick(step)  # [B, Hq or H, n]
        if T > 1:  # a turn's own tokens are seen whatever is picked
            own = torch.arange(len(store) - T, len(store), device=at.device)
            at = torch.cat((at.masked_fill(at >= len(store) - T, -1), own.expand(*at.shape[:2], T)), dim=-1)
        return self.attend_to(step, at)
