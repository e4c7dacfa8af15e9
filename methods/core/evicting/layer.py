"""One layer under an Eviction: the loop that all eviction methods share, written once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import Sums, top
from methods.core.budget import share
from methods.core.contract import Holding, LayerCache, Stage, Step
from methods.core.decision import (
    EvictionContext,
    check_scores,
    check_unpinned,
    joined,
    newest,
    on_device,
    real_tokens,
    taken,
)
from methods.core.evicting.blocks import Blocks
from methods.core.evicting.nulls import random_scores, recency_scores
from methods.core.store import spare
from methods.core.stores.quantized import QuantizedStore

if TYPE_CHECKING:
    from methods.core.eviction import Eviction


class EvictionCache(LayerCache):
    """One layer under an Eviction: the loop written once."""

    def __init__(self, method: Eviction, prompt_len: int | None):
        self.method = method
        make = method.store or method.allocator.new_store
        self.store = make(capacity=None if method.prompt_chunk(prompt_len or 0) else prompt_len)
        self.prompt_len = prompt_len
        self.prompt: list[int] = []  # tokens of each row's prompt, once it has ended
        self.kept_per_head: list[int] = []
        self.mean_kept: list[int] = []  # the same on average over layers and heads
        self.prompt_end: Tensor | None = None  # tokens of each row up to its prompt's end, [B, 1, 1]
        self.since: list[int] = []  # tokens of each row since it last had to drop
        self.tokens: list[int] = []  # that each row has read, once its prompt has ended; for sliding layers
        self.again = False  # whether a prompt has ended before
        self.dropped = False  # whether any slot has gone, so that heads may hold different numbers
        self.sees: int | None = None  # slots of a head that the next query of a sliding layer can see
        self.queries: list[tuple[Tensor, Tensor]] = []  # the newest ones, as many as `query_window` needs
        self.blocks: Blocks | None = None  # of the prompt's queries, for a method that asks for them
        self.n_window_queries = 0  # of this step
        self.mass: Tensor | None = None  # their attention, until the step ends
        self.asked: Mapping[Hashable, Sums] = {}  # sums over this step's attention
        self.sums: dict[Hashable, Tensor] = {}  # their values, until the step ends

    def append(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)
        self.n_window_queries = self.method.n_window_queries(self.store, step)
        self.asked = self.method.sums(self.store, step)

    def attend(self, step: Step) -> Tensor:
        if self.asked:
            window = [Sums(newest=self.n_window_queries)] if self.n_window_queries else []
            out, values = self.store.attend_with_sums(step, [*self.asked.values(), *window])
            assert out is not None
            self.sums = dict(zip(self.asked, values, strict=False))
            self.mass = values[-1] if window else None
            return out
        if not self.n_window_queries:
            return self.store.attend(step)
        out, self.mass = self.store.attend_with_mass(step, self.n_window_queries)
        return out

    def end_step(self, step: Step) -> None:
        if self.n_window_queries and self.mass is None:  # the output was another cache's
            self.mass = self._shared_mass(step)
        if self.asked:
            self.sums = self.sums or self._shared_sums(step)
            self.method.observe_sums(self.store, step, self.sums)
        self._observe_blocks(step)
        self._observe(step)
        self._trim(step)
        self._remember(step)
        self._decide(step)
        if step.stage is not Stage.MID_PROMPT:  # packing is lossy, so a long prompt is packed once, whole
            self.store.pack(step)
        self.mass, self.sums = None, {}

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def workspace(self) -> Iterable[Tensor]:
        for pair in self.queries:
            yield from pair
        if self.blocks is not None:
            yield from self.blocks.tensors()

    def holding(self) -> Holding:
        return self.store.holding(self.sees)

    def held_bytes(self) -> list[int]:
        return self.store.held_bytes(self.sees)

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """The budget's share, whatever `Method.slots` keeps at least."""
        if not self.prompt:
            return list(full)
        parts = [share(self.method.budget, n) for n in self.prompt]
        return [math.ceil(size * part - 1e-6) for size, part in zip(full, parts, strict=True)]

    def expect(self, new: int) -> None:
        self.store.expect(new)

    def positions(self) -> Tensor:
        return self.store.pos

    def traits(self, row: int) -> Mapping[str, Any]:
        return self.store.traits(row) if isinstance(self.store, QuantizedStore) else {}

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)
        self.queries = [(q[rows], pos[rows]) for q, pos in self.queries]
        if self.blocks is not None:
            self.blocks.reorder(rows)
        sizes = (self.prompt, self.kept_per_head, self.since, self.tokens, self.mean_kept)
        self.prompt, self.kept_per_head, self.since, self.tokens, self.mean_kept = (taken(x, rows) for x in sizes)
        self.prompt_end = None if self.prompt_end is None else self.prompt_end.index_select(0, rows)

    def _shared_mass(self, step: Step) -> Tensor:
        """The window queries' attention, computed once for all caches that hold the same whole prompt."""
        key, known = ("mass", self.n_window_queries, len(self.store)), self._known(step)
        if key not in known:
            known[key] = self.store.mass(step, self.n_window_queries)
        return known[key]

    def _shared_sums(self, step: Step) -> dict[Hashable, Tensor]:
        """The sums that were asked for, computed once for all caches that hold the same whole prompt."""
        known = self._known(step)
        keys = {key: ("sums", key, len(self.store)) for key in self.asked}
        missing = [key for key in self.asked if keys[key] not in known]
        asked = [self.asked[key] for key in missing]
        values = self.store.attend_with_sums(step, asked, output=False)[1] if missing else []
        known.update({keys[key]: value for key, value in zip(missing, values, strict=True)})
        return {key: known[keys[key]] for key in self.asked}

    def _observe_blocks(self, step: Step) -> None:
        """Tell the method of the blocks of a prompt that are whole now."""
        ends = step.stage is Stage.ENDS_PROMPT
        size = self.method.block_size(self.prompt_len or step.q.shape[2])
        if size is None or not (ends or step.stage is Stage.MID_PROMPT):
            return
        self.blocks = self.blocks or Blocks(size)
        for probs, pos in self.blocks.attention(self.store, step, ends, self._known(step)):
            self.method.observe_block(self.store, step, probs, pos)

    def _known(self, step: Step) -> dict[Any, Tensor]:
        """Where statistics of this step are kept for all caches that hold the same: slots may have gone, or weigh."""
        return {} if self.kept_per_head or self.store.weights() else step.memo

    def _trim(self, step: Step) -> None:
        """In a sliding layer, let go of what no later query can see, now and then."""
        window, store = step.rules.window, self.store
        if window is None:
            return
        self.sees, slack = window - 1, spare(window)
        if step.stage is Stage.MID_PROMPT:
            self._let_go(step, step.pos[:, -1] + 1)
        elif step.stage is not Stage.ENDS_PROMPT:
            before, self.tokens = self.tokens, [n + m for n, m in zip(self.tokens, real_tokens(step), strict=True)]
            if store.in_order and (store.heads_alike or not self.dropped):
                store.keep_newest(window - 1, slack)
            # when a row lets go is its own affair: neither other rows nor padding decide what it holds
            elif any(n // slack > m // slack for n, m in zip(self.tokens, before, strict=True)):
                self._let_go(step, on_device([n // slack * slack for n in self.tokens], step.pos.device))

    def _let_go(self, step: Step, next_query: Tensor) -> None:
        """In a sliding layer, drop what a query at position next_query [B] does not see."""
        window, store = step.rules.window, self.store
        if window is None:
            return
        if store.in_order and (store.heads_alike or not self.dropped):
            store.keep_newest(window - 1)
            return
        real = store.pos >= 0  # [B, H, S]
        seen = real & (store.pos > next_query[:, None, None] - window)
        n = seen.sum(-1)
        if bool((n < real.sum(-1)).any()):
            store.keep(seen, int(n.max()), exact=bool((n == n.max()).all()))

    def _observe(self, step: Step) -> None:
        self.method.observe(self.store, step, self.mass)

    def _decide(self, step: Step) -> None:
        """Drop slots where it is time to."""
        if step.stage is Stage.ENDS_PROMPT:
            self._end_prompt(step)
        elif step.stage is not Stage.MID_PROMPT and self.method.interval is not None:
            self._drop_again(step, self.method.interval)

    def _end_prompt(self, step: Step) -> None:
        self.again = bool(self.prompt)
        self.tokens = (step.pos.amax(-1) + 1).tolist()  # also where earlier ones have been dropped
        window = step.rules.window
        self.prompt = self.tokens if window is None else [min(n, window - 1) for n in self.tokens]
        self.prompt_end = step.pos.amax(-1)[:, None, None] + 1
        self._let_go(step, step.pos[:, -1] + 1)
        self.kept_per_head = self._kept_after_prompt(step)
        self.since = [self.method.above_cap(min(n, m), n) for n, m in zip(self.prompt, self.mean_kept, strict=True)]
        self._drop(step)
        self.queries, self.again = [], True

    def _kept_after_prompt(self, step: Step) -> list[int]:
        """Slots per head that each row keeps when the prompt ends."""
        kept = self._kept_here(step, [self.method.slots(n) for n in self.prompt])
        return [min(n, m) for n, m in zip(self.prompt, kept, strict=True)]

    def _kept_here(self, step: Step, mean: Sequence[int], prompt: Sequence[int] | None = None) -> list[int]:
        """Slots that each row keeps per head of this layer, where the budget leaves `mean` over all layers and heads.

        Never fewer than are pinned and one more.  prompt: tokens of the rows' prompts where they have not ended.
        """
        share, pins = self.method.allocator.slots, self.method.pins
        prompt = self.prompt if prompt is None else prompt
        self.mean_kept = [self.method.with_pins(kept, n) for kept, n in zip(mean, prompt, strict=True)]
        here = [share(step.layer, step.n_layers, kept) for kept in self.mean_kept]
        if pins.is_own:
            return here
        taken = [pins.taken(kept, n) for kept, n in zip(self.mean_kept, prompt, strict=True)]
        return [max(kept, pinned + 1) for kept, pinned in zip(here, taken, strict=True)]

    def _drop_again(self, step: Step, interval: int) -> None:
        """Down to the budget in the rows that have read `interval` tokens since they last were."""
        new = real_tokens(step)
        self.since = [n + m for n, m in zip(self.since, new, strict=True)]
        due = [n >= interval for n in self.since]
        if not any(due):
            return
        self.since = [0 if d else n for n, d in zip(self.since, due, strict=True)]
        self._let_go(step, (step.pos[:, -1] + 1).where(on_device(due, step.pos.device), 0))
        held = self._count()
        again = self._kept_here(step, [self.method.again(n, m) for n, m in zip(self.prompt, held, strict=True)])
        self.kept_per_head = [n if d else m for n, m, d in zip(again, held, due, strict=True)]
        self._drop(step, held if step.rules.window is None else None)  # where slots go by age, heads hold other numbers

    def _count(self) -> list[int]:
        """Slots of each row's fullest head; waits for the device once heads may hold different numbers."""
        if not self.store.padded and not self.dropped:
            return [len(self.store)] * len(self.store.pos)
        return (self.store.pos >= 0).sum(-1).amax(-1).tolist()

    def _drop(self, step: Step, held: list[int] | None = None) -> None:
        """Score all slots, keep the best.

        held: slots that every head of a row holds, where that is known; else the device may have to be asked.
        """
        method, store = self.method, self.store
        real = store.pos >= 0  # [B, H, S]
        known = method.fills_budget and (held is not None or not store.padded)
        if held is None:
            held = self._count()
        kept = [min(n, m) for n, m in zip(self.kept_per_head, held, strict=True)]
        if kept == held:
            return
        budget_slots = on_device(kept, real.device)  # [B]
        q, q_pos = joined(self.queries or [(step.q, step.pos)])
        context = EvictionContext(
            q, q_pos, real, self.prompt, kept, budget_slots[:, None, None], self.mass, self.again, *self._of_pins()
        )
        scores = self._scores(step, context)
        fits = [n == m for n, m in zip(kept, held, strict=True)]
        if any(fits):  # that another row must drop is no reason for this one to
            fit = on_device(fits, real.device)[:, None, None]
            scores, context._ranked = (x.masked_fill(fit, torch.inf) for x in (scores, context._ranked))
        scores = scores.masked_fill(~real, -torch.inf)
        if step.stage is Stage.ENDS_PROMPT or scores.device.type == "cpu":  # elsewhere a look waits for the device
            check_scores(method.score, context._ranked.masked_fill(~real, -torch.inf), real)
        keep = self._pick(scores, budget_slots)
        if method.score_by == "random_in_counts":
            keep = self._redrawn(step, context, keep)
        method.before_drop(store, keep)
        self.dropped = True
        store.lose([not fit for fit in fits])
        exact = min(kept) == max(kept) if known else bool((keep.sum(-1) == max(kept)).all())
        store.keep(keep, max(kept), exact=exact)
        if known:
            store.count(kept)

    def _of_pins(self) -> tuple[list[int], Tensor | None]:
        """What a context says of the pins' sizes and place."""
        return self.mean_kept, self.prompt_end

    def _scores(self, step: Step, cut: EvictionContext) -> Tensor:
        """Scores [B, H, S], the method's or a null's; +inf for what is pinned."""
        method, store = self.method, self.store
        scores = cut._ranked = self._ranked(step, cut)
        pinned = method.pinned(store, step, cut)
        return scores if pinned is None else scores.masked_fill(pinned, torch.inf)

    def _ranked(self, step: Step, cut: EvictionContext) -> Tensor:
        """What ranks the slots that are not pinned, [B, H, S]."""
        method, store = self.method, self.store
        if method.score_by == "random":
            return random_scores(method.seed, store, step, cut, method.draw)
        if method.score_by == "recency":
            return recency_scores(store)
        scores = method.score(store, step, cut)
        if not method.pins.is_own and (step.stage is Stage.ENDS_PROMPT or scores.device.type == "cpu"):
            check_unpinned(method.score, scores, cut.real, method.pins.at)
        return scores

    def _redrawn(self, step: Step, cut: EvictionContext, keep: Tensor) -> Tensor:
        """As many slots per head as keep [B, H, S] has, those that are not pinned drawn at random."""
        method, store = self.method, self.store
        scores = random_scores(method.seed, store, step, cut, method.draw).masked_fill(~cut.real, -torch.inf)
        pinned = method.pinned(store, step, cut)
        if pinned is not None:
            scores = scores.masked_fill(pinned & cut.real, torch.inf)
        return top(scores, keep.sum(-1))

    def _pick(self, scores: Tensor, budget_slots: Tensor) -> Tensor:
        """The allocator's keep-mask [B, H, S], the lower position winning at equal scores."""
        pick = self.method.allocator.pick
        if self.store.in_order:
            return pick(scores, budget_slots)
        order = self.store.pos.argsort(dim=-1, stable=True)
        return torch.zeros_like(order, dtype=torch.bool).scatter(2, order, pick(scores.gather(2, order), budget_slots))

    def _remember(self, step: Step) -> None:
        """Hold the newest queries that the next decision will need."""
        if step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            query_window = max(1, self.method.query_window(self.prompt_len or step.q.shape[2]))
        elif self.method.interval is not None:
            query_window = self.method.interval
        else:
            return
        self.queries.append((step.q, step.pos))
        if step.padded and step.stage is Stage.TURN:  # its padding stands between a row's queries
            self.queries = [newest(*joined(self.queries), query_window)]
        extra = sum(q.shape[2] for q, _ in self.queries) - query_window
        while extra > 0 and self.queries[0][0].shape[2] <= extra:
            extra -= self.queries.pop(0)[0].shape[2]
        if extra > 0:
            q, pos = self.queries[0]
            self.queries[0] = (q[:, :, extra:], pos[:, extra:])
            if step.stage is not Stage.ENDS_PROMPT:  # a view would keep the whole chunk alive
                self.queries[0] = tuple(x.clone() for x in self.queries[0])
