"""StreamingLLM: keep the first tokens, where attention sinks, and the newest; number positions inside the cache.

Paper: Xiao et al. 2023, arXiv:2309.17453, section 3.2.
Idea:  `sinks` first and the newest tokens stay, everything between goes: once when the prompt ends, then one token per
       step, so that the cache never grows. Positions are those of the slots, so that they never exceed the cache.
Here:  RoPE and ALiBi see only differences of positions. Numbering the slots 0, 1, 2, … therefore equals keeping the
       newest tokens' positions and moving the sinks forward by the number of dropped tokens: only the sinks' keys are
       rotated again, each time from the original. positions=original leaves them, as common re-implementations do.
       prefill=exact lets the prompt attend in full before the first drop (what benchmarks compare);
       prefill=streaming gives prompt queries the band they would have seen token by token. budget=1 drops nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Rules, attend
from kernels.attend.reference import logits
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import Cut, Eviction, EvictionCache
from methods.core.store import Store

BLOCK = 256  # queries per block of a streaming prompt


@dataclass
class StreamingLLM(Eviction):
    """Sinks and a recent window of fixed size.

    sinks: first tokens that always stay.
    positions: "rolled" (the paper's, inside the cache) or "original".
    prefill: "exact" or "streaming".
    """

    sinks: int = 4
    positions: str = "rolled"
    prefill: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0 or 1 < self.budget <= self.sinks:
            raise UserError(
                f"StreamingLLM: method.sinks={self.sinks}, budget={self.budget}; sinks is at least 0 and leaves a slot "
                "for the newest token"
            )
        if self.positions not in ("rolled", "original"):
            raise UserError(f"StreamingLLM: method.positions={self.positions}; it is rolled or original")
        if self.prefill not in ("exact", "streaming"):
            raise UserError(f"StreamingLLM: method.prefill={self.prefill}; it is exact or streaming")

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """Streaming prompts see less than the model's own."""
        return self.prefill == "streaming"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        if self.positions == "rolled" and not spec.alibi and any(rope is None for rope in spec.ropes):
            raise UserError(
                f"StreamingLLM: method.positions=rolled needs RoPE with fixed frequencies or ALiBi, {spec.name} has "
                "neither; method.positions=original works"
            )
        return [StreamingCache(self, prompt_len) for _ in range(spec.n_layers)]

    def slots(self, n: int) -> int:
        return max(super().slots(n), self.sinks + 1)

    def score(self, store: Store, step: Step, cut: Cut) -> Tensor:
        """The newest first, [B, H, S]; sinks are +inf."""
        return cut.rank.float().masked_fill((cut.rank >= 0) & (cut.rank < self.sinks), torch.inf)


class StreamingCache(EvictionCache):
    """One layer of sinks and recent tokens; a new token takes the place of the oldest recent one."""

    method: StreamingLLM

    def __init__(self, method: StreamingLLM, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.sink_k: Tensor | None = None  # [B, H, sinks, D], as the model rotated them

    def attend(self, step: Step) -> Tensor:
        if self.method.prefill == "streaming" and step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            return self._attend_band(step)
        if self.method.positions == "rolled" and self.sink_k is not None:
            return self._attend_rolled(step)
        return super().attend(step)

    def settle(self, step: Step) -> None:
        super().settle(step)
        dropping = self.limit and self.limit != self.prompt
        if not dropping:
            return
        if step.stage is Stage.ENDS_PROMPT:
            if self.method.positions == "rolled" and self.method.sinks:
                self.sink_k = self.store.k[:, :, : self.method.sinks].clone()
        elif step.stage is Stage.TURN:
            self._drop(step)
        elif step.stage is Stage.DECODE:
            self._drop_oldest()

    def tensors(self) -> Iterable[Tensor]:
        yield from super().tensors()
        if self.sink_k is not None:
            yield self.sink_k

    def overhead(self) -> int:
        return super().overhead() + (0 if self.sink_k is None else self.sink_k.nbytes)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if self.sink_k is not None:
            self.sink_k = self.sink_k[rows]

    def _drop_oldest(self) -> None:
        """Free the oldest recent slot of every row that is over its limit, [B]."""
        store, pos = self.store, self.store.pos
        recent = torch.where(pos >= self.method.sinks, pos, torch.iinfo(pos.dtype).max)
        store.drop(recent.argmin(-1))

    def _attend_rolled(self, step: Step) -> Tensor:
        """Sinks as far behind the newest token as their slots are."""
        assert self.sink_k is not None
        store, s = self.store, self.sink_k.shape[2]
        held = (store.pos >= 0).sum(-1)  # [B, H]
        gap = (step.pos[:, -1:] + 1 - held).to(step.pos.dtype)  # [B, H], tokens dropped so far
        pos = store.pos
        if step.rules.slopes is not None:
            pos = torch.cat((pos[:, :, :s] + gap[..., None], pos[:, :, s:]), dim=2)
            return attend(step.q, store.k, store.v, step.rules, q_pos=step.pos, k_pos=pos)
        assert step.rope is not None
        store.k[:, :, :s] = step.rope.rotate(self.sink_k, gap[..., None].expand(-1, -1, s))
        return store.attend(step)

    def _attend_band(self, step: Step) -> Tensor:
        """Prompt queries over the sinks and the tokens that were still there at their turn."""
        store, method = self.store, self.method
        k, v = store.read()
        planned = self.prompt_len or len(store)
        width = method.slots(planned) - method.sinks
        out = torch.empty_like(step.q[..., : v.shape[-1]])
        for i in range(0, step.q.shape[2], BLOCK):
            q, q_pos = step.q[:, :, i : i + BLOCK], step.pos[:, i : i + BLOCK]
            out[:, :, i : i + BLOCK] = self._band(step, q, q_pos, k, v, width)
        return out

    def _band(self, step: Step, q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        B, Hq, T, _ = q.shape
        k_pos, s = self.store.pos, self.method.sinks
        H = k.shape[1]
        sink = (k_pos >= 0) & (k_pos < s)  # [B, H, S]
        band = Rules(step.rules.scale, step.rules.softcap, width + 1, step.rules.slopes)
        far = logits(q, k, band, q_pos, torch.where(sink, -1, k_pos))  # [B, H, G, T, S], sinks unseen
        n_sink = int(sink[:, 0].sum(-1).max())
        first = sink[:, 0].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :n_sink]  # [B, n_sink]
        at = first[:, None, :, None]
        near_k = k.gather(2, at.expand(-1, H, -1, k.shape[-1]))
        near_pos = torch.where(sink, k_pos, -1)[:, :1].gather(2, first[:, None])
        gap = (q_pos - (s + width)).clamp_min(0) if self.method.positions == "rolled" else torch.zeros_like(q_pos)
        if step.rules.slopes is None and self.method.positions == "rolled":
            assert step.rope is not None
            q = step.rope.rotate(q, -gap[:, None].expand(B, Hq, T))  # closer by what was dropped, seen from the query
            near = logits(q, near_k, Rules(step.rules.scale, step.rules.softcap), q_pos, near_pos)
        else:
            # ALiBi wants positions: the query moves back instead, never before the sinks
            near = logits(q, near_k, step.rules, q_pos - gap, near_pos)
        p = torch.cat((near, far), dim=-1).softmax(-1).nan_to_num(0.0).to(v.dtype)
        values = torch.cat((v.gather(2, at.expand(-1, H, -1, v.shape[-1])), v), dim=2)
        return (p.reshape(B, H, -1, p.shape[-1]) @ values).view(B, Hq, T, -1)
