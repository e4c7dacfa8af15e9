"""StreamingLLM: keep the first tokens, where attention sinks, and the newest; number positions inside the cache.

Paper: Xiao et al. 2023, arXiv:2309.17453, section 3.2.
Idea:  `sinks` first and the newest tokens stay, everything between goes: once when the prompt ends, then one token per
       step, so that the cache never grows. Positions are those of the slots, so that they never exceed the cache.
Here:  RoPE and ALiBi see only differences of positions. Numbering the slots 0, 1, 2, … therefore equals keeping the
       newest tokens' positions and moving the sinks forward by the number of dropped tokens: only the sinks' keys are
       rotated again, each time from the original. positions=original leaves them, as common re-implementations do.
       prefill=exact lets the prompt attend in full before the first drop (what benchmarks compare);
       prefill=streaming shows a prompt query what decoding would: sinks, window and itself. budget=1 drops nothing.
       A sliding-window layer has mostly lost the sinks before the prompt ends: it keeps its newest slots as they are,
       and sinks while later queries see them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import attend, reads
from kernels.attend.reference import averages, logits
from methods.core.contract import Holding, LayerCache, ModelSpec, Stage, Step
from methods.core.decision import real_tokens, taken
from methods.core.errors import NotHere, UserError
from methods.core.evicting.nulls import recency_scores
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.store import Store

BLOCK = 256  # queries per block of a streaming prompt


@dataclass
class StreamingLLM(Eviction):
    """Sinks and a recent window of fixed size.

    sinks: first tokens that always stay.
    positions: "rolled" (the paper's, inside the cache) or "original".
    prefill: "exact" or "streaming".
    dialogue: make room before a later turn is read, so that the cache never exceeds its size, instead of after it.
    """

    fills_budget: ClassVar[bool] = True

    sinks: int = 4
    positions: str = "rolled"
    prefill: str = "exact"
    dialogue: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pins.at == "none":
            self.sinks = 0  # all that it protects; what it scores by is recency
        for key, value, typed in (
            ("decode.cap", self.decode.cap, self.decode.cap is not None),
            ("pin", self.pins.at, self.pins.at not in ("own", "none")),
            ("score_by", self.score_by, self.score_by != "own"),
            ("decode.every", self.decode.every, self.decode.every is not None),
        ):
            if typed:
                raise NotHere(
                    f"method.{key}={value}: StreamingLLM is recency with its first slots pinned, one out for each that "
                    "comes in, and its positions are numbered by that; method=recency takes it"
                )
        if self.sinks < 0 or self.request.within(self.sinks):
            kind = UserError if self.sinks < 0 else NotHere
            raise kind(
                f"StreamingLLM: method.sinks={self.sinks}, budget={self.budget}; sinks is at least 0 and leaves a slot "
                "for the newest token"
            )
        if self.positions not in ("rolled", "original"):
            raise UserError(f"StreamingLLM: method.positions={self.positions}; it is rolled or original")
        if self.prefill not in ("exact", "streaming"):
            raise UserError(f"StreamingLLM: method.prefill={self.prefill}; it is exact or streaming")

    @property
    def drops_later(self) -> bool:
        return not self.request.is_off

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """Streaming prompts see less than the model's own."""
        return self.prefill == "streaming"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        other = [i for i, rope in enumerate(spec.ropes) if rope is None]
        if self.positions == "rolled" and other and not spec.alibi:
            raise UserError(
                "StreamingLLM: method.positions=rolled needs ALiBi, or RoPE of a known form with fixed frequencies in "
                f"every layer; layer {other[0]} of {spec.name} has neither; method.positions=original works"
            )
        return [StreamingCache(self, prompt_len) for _ in range(spec.n_layers)]

    @property
    def least(self) -> int:
        return self.sinks + 1

    def capacity(self, n: int) -> int:
        """Slots per head after a prompt of n tokens; a number of slots also bounds what a shorter prompt grows to."""
        if self.request.is_off:
            return sys.maxsize
        return self.request.number or self.slots(n)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest first, [B, H, S]."""
        return recency_scores(store)

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The sinks."""
        return self.are_sinks(store, step)

    def are_sinks(self, store: Store, step: Step) -> Tensor:
        """Which slots stay as sinks, [B, H, S]: in a sliding layer while later queries see them."""
        pos, window = store.pos, step.rules.window
        first = (pos >= 0) & (pos < self.sinks)
        return first if window is None else first & (pos > pos.amax(-1, keepdim=True) + 1 - window)


class StreamingCache(EvictionCache):
    """One layer of sinks and recent tokens; a new token takes the place of the oldest recent one."""

    method: StreamingLLM

    def __init__(self, method: StreamingLLM, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.sink_k: Tensor | None = None  # [B, H, sinks, D], as the model rotated them
        self.held: list[int] = []  # slots per head of each row

    def append(self, step: Step) -> None:
        if self.method.dialogue and step.stage is Stage.TURN:
            self._shrink(step, real_tokens(step))
        super().append(step)

    def attend(self, step: Step) -> Tensor:
        if self.method.prefill == "streaming" and step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            return self._attend_band(step)
        if self.method.positions == "rolled" and self.sink_k is not None:
            return self._attend_rolled(step)
        return super().attend(step)

    def end_step(self, step: Step) -> None:
        whole = None if self.sink_k is None else self._gap(step) == 0  # [B, H], heads that have dropped nothing yet
        super().end_step(step)
        if step.stage is Stage.MID_PROMPT:
            return
        if step.stage is Stage.ENDS_PROMPT:
            dropped = self.kept_per_head != self.prompt
            self.held = self._count()  # at a later prompt's end maybe fewer than it allows
            self.kept_per_head = [self._capacity(n, step.rules.window) for n in self.prompt]
            self.store.cap(max(self.kept_per_head) + 1)
            if dropped:
                self._hold_sinks(step, whole)
            return
        self.held = [n + m for n, m in zip(self.held, real_tokens(step), strict=True)]
        over = [n - kept for n, kept in zip(self.held, self.kept_per_head, strict=True)]
        # until a drop has moved it behind, padding may stand before the sinks
        if all(n == 1 for n in over) and (self.dropped or not self.store.padded):
            self._drop_oldest(step)
        elif max(over) > 0:
            self._shrink(step)
        else:
            return
        self._hold_sinks(step, whole)

    def tensors(self) -> Iterable[Tensor]:
        yield from super().tensors()
        if self.sink_k is not None:
            yield self.sink_k

    def holding(self) -> Holding:
        plain = super().holding()
        if self.sink_k is None:
            return plain
        size, sinks = self.sink_k.nbytes // len(self.sink_k), self._of_sinks()
        held, beside = ([n + more for n, more in zip(x, sinks, strict=True)] for x in (plain.held, plain.beside))
        padding, alike = (
            [n + size - more for n, more in zip(x, sinks, strict=True)]
            for x in (plain.padding, plain.alike or [0] * len(sinks))
        )
        return Holding(held, beside, padding, alike)

    def held_bytes(self) -> list[int]:
        held = super().held_bytes()
        return held if self.sink_k is None else [n + more for n, more in zip(held, self._of_sinks(), strict=True)]

    def _of_sinks(self) -> list[int]:
        """Bytes of the sinks' keys in every row; one that has dropped nothing needs none."""
        assert self.sink_k is not None
        size = self.sink_k.nbytes // len(self.sink_k)
        return [0 if uncut else size for uncut in self.store.whole or [False] * len(self.sink_k)]

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.held = taken(self.held, rows)
        if self.sink_k is not None:
            self.sink_k = self.sink_k[rows]

    def _hold_sinks(self, step: Step, whole: Tensor | None = None) -> None:
        """After a drop: remember the sinks' keys as the model rotated them.

        whole [B, H]: heads that had dropped nothing before; what they hold may have more sinks than when it was last
        remembered, and is as the model rotated it.
        """
        if self.method.positions != "rolled" or not self.method.sinks or step.rules.window:
            return
        first = self.store.k[:, :, : self.method.sinks]
        if self.sink_k is None or whole is None:
            self.sink_k = first.clone()
        else:
            self.sink_k = torch.where(whole[:, :, None, None], first, self.sink_k)

    def _gap(self, step: Step) -> Tensor:
        """Tokens that each head has dropped so far, [B, H]."""
        return (step.pos[:, -1:] + 1 - (self.store.pos >= 0).sum(-1)).to(step.pos.dtype)

    def _capacity(self, n: int, window: int | None) -> int:
        """Slots per head after a prompt of n tokens; no limit where a sliding layer sees no more by itself."""
        capacity = self.method.capacity(n)
        return capacity if window is None or capacity < window - 1 else sys.maxsize

    def _let_go(self, step: Step, next_query: Tensor) -> None:
        """Nothing once slots have been dropped: a sink that no query sees is the next to go."""
        if not self.dropped:
            super()._let_go(step, next_query)

    def _drop_oldest(self, step: Step) -> None:
        """Free the oldest recent slot of every head, for the next token to take."""
        store, pos = self.store, self.store.pos
        recent = torch.where((pos >= 0) & ~self.method.are_sinks(store, step), pos, torch.iinfo(pos.dtype).max)
        slot = recent.argmin(-1)  # [B, H]
        if type(self.method).before_drop is not Eviction.before_drop:
            self.method.before_drop(store, (pos >= 0).scatter(2, slot[..., None], False))
        store.drop(slot)
        store.lose([True] * len(pos))
        self.dropped = True
        self.held = self.kept_per_head

    def _shrink(self, step: Step, incoming: list[int] | None = None) -> None:
        """Drop to what may stay, less the `incoming` tokens of each row; sinks and one recent token stay."""
        kept, least = self.kept_per_head, self.method.sinks + 1
        self.kept_per_head = [max(n - m, least) for n, m in zip(kept, incoming or [0] * len(kept), strict=True)]
        self._drop(step, None if step.rules.window else self.held)  # a sliding layer lets go of slots by itself
        self.held = [min(n, m) for n, m in zip(self.held, self.kept_per_head, strict=True)]
        self.kept_per_head = kept

    def _attend_rolled(self, step: Step) -> Tensor:
        """Sinks as far behind the newest token as their slots are."""
        assert self.sink_k is not None
        store, s = self.store, self.sink_k.shape[2]
        gap, pos = self._gap(step), store.pos  # [B, H], [B, H, S]
        if step.rules.slopes is not None:
            pos = torch.cat((pos[:, :, :s] + gap[..., None], pos[:, :, s:]), dim=2)
            return attend(step.q, store.k, store.v, step.rules, q_pos=step.pos, k_pos=pos)
        assert step.rope is not None
        reads.note(self.sink_k, there=(gap > 0)[..., None].expand(-1, -1, s))  # a whole row's are in its slots
        store.rekey(step.rope.rotate(self.sink_k, gap[..., None].expand(-1, -1, s)))
        return store.attend(step)

    def _attend_band(self, step: Step) -> Tensor:
        """Prompt queries over the sinks and the tokens that were still there at their turn."""
        store, method = self.store, self.method
        k, v = store.read()
        padding = (store.pos[:, 0] < 0).sum(-1)  # [B], all of it stands before the prompt
        rows = [(self.prompt_len or len(store)) - p for p in padding.tolist()]
        width = torch.tensor([method.slots(n) - method.sinks for n in rows], device=k.device)
        if method.request.is_off:
            width = torch.full_like(width, len(store))
        out = torch.empty(*step.q.shape[:-1], v.shape[-1], dtype=step.q.dtype, device=k.device)
        for i in range(0, step.q.shape[2], BLOCK):
            q, q_pos = step.q[:, :, i : i + BLOCK], step.pos[:, i : i + BLOCK]
            out[:, :, i : i + BLOCK] = self._band(step, q, q_pos, k, v, width[:, None])
        return out

    def _band(self, step: Step, q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, width: Tensor) -> Tensor:
        """One block of queries; width [B, 1]: older recent tokens that each sees."""
        B, Hq, T, _ = q.shape
        H, pos, s = k.shape[1], self.store.pos, self.method.sinks
        sink = (pos >= 0) & (pos < s)  # [B, H, S]
        far = logits(q, k, step.rules, q_pos, torch.where(sink, -1, pos))  # [B, H, G, T, S]
        gone = q_pos[:, None, :, None] - pos[:, :, None, :] > width[..., None, None]  # [B, H, T, S]
        far = far.masked_fill(gone[:, :, None], -torch.inf)

        at = sink.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :s, None]  # [B, H, s, 1]
        sink_k, sink_v = (x.gather(2, at.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
        sink_pos = torch.where(sink, pos, -1).gather(2, at[..., 0])
        if self.method.positions == "rolled":
            # seen from the query, the sinks come closer by the tokens dropped before its turn
            gap = (q_pos - s - width).clamp_min(0)  # [B, T]
            if step.rules.slopes is not None:
                q_pos = q_pos - gap
            else:
                assert step.rope is not None
                q = step.rope.rotate(q, -gap[:, None].expand(B, Hq, T))
        near = logits(q, sink_k, step.rules, q_pos, sink_pos)  # [B, H, G, T, s]

        p = torch.cat((near, far), dim=-1).softmax(-1).nan_to_num(0.0).to(q.dtype)
        return averages(p.reshape(B, H, -1, p.shape[-1]), torch.cat((sink_v, v), dim=2)).view(B, Hq, T, -1)
