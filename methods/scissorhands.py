"""Scissorhands: drop many tokens at once, those that the latest queries found unimportant most often.

Paper: Liu et al. 2023, arXiv:2305.17118, section 4.
Idea:  a token that matters once goes on mattering. A query that gives a slot less attention than an even share, 1 / t
       of its t slots, votes against it. When the cache is full, the slots with the most votes of the last `history`
       queries go, a share of the cache at once; the newest `recent` stay. The cache then fills up again: a sawtooth.
Here:  query heads that share a KV head average their attention and vote once. Votes are bits, counted raw (a slot that
       came in lately has had fewer chances to collect them; normalise=true divides by those chances). At equal votes
       the newer slot goes (tie=prob: the one with less attention over the same queries, which holds `history` floats
       per slot). The prompt attends in full and is cut once, to where a full cache is cut; a prompt that fits is not
       (evict=per_chunk, in chunks of one token: the prompt is read under the same budget, and the same sawtooth).
       The released evaluation keeps no budget and thresholds at a percentile instead: not this.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_probs, visible
from methods.core.budget import slots
from methods.core.capped import Capped
from methods.core.contract import Stage, Step
from methods.core.errors import NotHere, UserError
from methods.core.eviction import EvictionContext
from methods.core.store import Store

BLOCK = 16  # queries whose attention is computed together


@dataclass
class Scissorhands(Capped):
    """A cache of at most `budget` slots that drops a share of them whenever it is full.

    history: queries whose votes count.
    recent: newest slots that always stay; tokens.
    drop: slots that go at once: a share of the full cache below 1, or a number.
    tie: "position" or "prob", see above.  normalise: votes per query that could vote.
    """

    history: int = 400
    recent: int = 10
    drop: float | int = 0.5
    tie: str = "position"
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1 or self.recent < 0:
            raise UserError(
                f"Scissorhands: method.history={self.history}, method.recent={self.recent}; history is at least 1 "
                "query, recent at least 0 tokens"
            )
        if self.drop <= 0 or (self.drop >= 1 and self.drop != int(self.drop)):
            raise UserError(
                f"Scissorhands: method.drop={self.drop}; it is a share below 1 or a whole number of slots, such as 0.5"
            )
        if self.tie not in ("position", "prob"):
            raise UserError(f"Scissorhands: method.tie={self.tie}; it is position or prob")
        if not self.allocator.even and not self.request.is_off:
            raise UserError(
                f"Scissorhands: method.allocator={type(self.allocator).__name__} lets heads hold different numbers of "
                "slots; the votes lie in a rectangle and need as many in every head: leave it out"
            )
        if self.request.within(self._least() - 1):
            raise NotHere(
                f"Scissorhands: {self.request} slots do not hold method.recent={self.recent}, one more and the "
                f"method.drop={self.drop} that go; raise it to {self._least()} or lower one of them"
            )

    def full(self, n: int) -> int:
        """Slots of a full cache after a prompt of n tokens."""
        return self.request.number or max(self._least(), self.request.slots(n))

    def slots(self, n: int) -> int:
        k = self.full(n)
        return n if n <= k or self.request.is_off else k - self._goes(k)

    def capacity(self, n: int) -> int:
        return self.full(n) - 1

    def target_size(self, n: int) -> int:
        return self.full(n) - self._goes(self.full(n))

    def n_window_queries(self, store: Store, step: Step) -> int:
        return 1 if step.stage is Stage.DECODE and not self.request.is_off else 0

    def observe(self, store: Store, step: Step, mass: Tensor | None) -> None:
        """Write down the votes of the step's queries, and their attention where it breaks ties."""
        if self.request.is_off:
            return
        B, H, S = store.pos.shape
        if mass is not None:  # one query, whose attention came with its output
            self._write(store, step, step.pos, mass.view(B, H, -1, S).mean(2)[:, :, None])
            return
        key = ("scissorhands", self.history, self.tie, S)
        tracks = [self._votes(store), *([self._seen(store)] if self.tie == "prob" else [])]
        alike = store.whole is None  # nothing has been dropped: caches of other budgets hold the same
        if alike and (*key, 0) in step.memo:
            for i, track in enumerate(tracks):
                track.copy_(step.memo[*key, i])
            return
        k, _ = store.read()
        first = max(0, step.q.shape[2] - self.history)
        for i in range(first, step.q.shape[2], BLOCK):
            q, q_pos = step.q[:, :, i : i + BLOCK], step.pos[:, i : i + BLOCK]
            p = attention_probs(q, k, step.rules, q_pos=q_pos, k_pos=store.pos)  # [B, H, G, t, S]
            self._write(store, step, q_pos, p.mean(2))
        if alike:
            step.memo.update({(*key, i): track for i, track in enumerate(tracks)})

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Minus the votes."""
        against = _ones(self._votes(store)).double()  # [B, H, S]
        if self.normalise:
            against = against / (step.pos[:, -1:, None] - store.pos + 1).clamp(1, self.history)
        scores = -against
        if self.tie == "prob":
            scores = ranks(scores, self._seen(store).sum(-1, dtype=torch.float64))
        return scores

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest."""
        return store.pos > step.pos[:, -1:, None] - self.recent

    def _least(self) -> int:
        """The smallest full cache that holds the recent slots and one more after a drop."""
        recent = self.recent if self.pins.is_own else 0
        if self.drop >= 1:
            return recent + int(self.drop) + 1
        k = recent + 2
        while k - self._goes(k) < recent + 1:
            k += 1
        return k

    def _goes(self, k: int) -> int:
        """Slots that a full cache of k drops at once."""
        return int(self.drop) if self.drop >= 1 else max(1, slots(self.drop, k))

    def _votes(self, store: Store) -> Tensor:
        """Votes against every slot, a bit per query of the history: [B, H, S, history / 8], uint8."""
        return store.track("votes", width=(-(-self.history // 8),), dtype=torch.uint8)

    def _seen(self, store: Store) -> Tensor:
        """Attention that every slot got from each query of the history, [B, H, S, history]."""
        return store.track("seen", width=(self.history,))

    def _write(self, store: Store, step: Step, q_pos: Tensor, p: Tensor) -> None:
        """Votes of queries at q_pos [B, t] with attention p [B, H, t, S], in the place of the oldest."""
        # a query votes against a slot that it sees and gives less than an even share of its attention
        seen = visible(q_pos, store.pos, step.rules.window)  # [B, H, t, S]
        low = seen & (p * seen.sum(-1, keepdim=True) < 1)
        # the history is a ring: a query writes over the column of the one that was read `history` tokens before it
        column = q_pos.long() % self.history  # [B, t]
        real = q_pos >= 0
        votes = self._votes(store)
        bit = torch.where(real, 1 << column % 8, 0)  # [B, t]; padding has no vote
        if q_pos.shape[1] == 1:  # while decoding a single byte of each slot changes: read it, replace the query's bit
            at = (column // 8)[:, None, None].expand(*store.pos.shape, 1)
            old = votes.gather(3, at)
            new = (old & ~bit[:, :, None, None].to(torch.uint8)) | (low.mT * bit[:, None, None]).to(torch.uint8)
            votes.scatter_(3, at, new)
        else:
            # several queries may share a byte. one_hot holds a query's bit in its byte: summed over the queries it says
            # which bits are new, and its product with the votes sums those bits, which no two queries share
            one_hot = torch.zeros(*bit.shape, votes.shape[-1], device=bit.device)
            one_hot.scatter_(2, (column // 8)[..., None], bit[..., None].float())  # [B, t, bytes]
            votes.bitwise_and_(~one_hot.sum(1).to(torch.uint8)[:, None, None])
            votes.bitwise_or_((low.mT.float() @ one_hot[:, None]).to(torch.uint8))
        if self.tie == "prob":  # the same with whole columns: old attention goes, that of the queries comes
            one_hot = torch.zeros(*bit.shape, self.history, device=bit.device)
            one_hot.scatter_(2, column[..., None], real[..., None].float())  # [B, t, history]
            held = self._seen(store)
            held.mul_(1 - one_hot.sum(1)[:, None, None]).add_(p.mT @ one_hot[:, None])


def ranks(first: Tensor, then: Tensor) -> Tensor:
    """How many different pairs along the last dimension lie below each pair, `then` deciding where `first` is equal."""
    order = then.argsort(dim=-1, stable=True)
    order = order.gather(-1, first.gather(-1, order).argsort(dim=-1, stable=True))
    a, b = first.gather(-1, order), then.gather(-1, order)
    higher = (a[..., 1:] != a[..., :-1]) | (b[..., 1:] != b[..., :-1])
    return torch.zeros_like(first).scatter(-1, order, F.pad(higher.cumsum(-1), (1, 0)).to(first.dtype))


def _ones(x: Tensor) -> Tensor:
    """Bits that are set in the bytes [..., n], summed over the last dimension."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(-1, dtype=torch.int32)
