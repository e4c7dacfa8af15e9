"""The loop that all eviction methods share: append, attend, score, drop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.core.allocate import Allocator, Uniform
from methods.core.budget import share, slots
from methods.core.contract import Holding, LayerCache, Method, ModelSpec, Stage, Step
from methods.core.decision import EvictionContext, check_scores, joined, newest, on_device, real_tokens, taken
from methods.core.errors import UserError
from methods.core.home.old_names import adopt
from methods.core.store import Store, spare


def __getattr__(name: str) -> Any:
    """EvictionContext by the name that it had, for methods of others."""
    if name != "Cut":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    said = "methods.core.eviction.Cut is EvictionContext now, and its `rank` is `age_rank`; the old names will go"
    warnings.warn(said, FutureWarning, stacklevel=2)
    return EvictionContext


@dataclass
class Eviction(Method):
    """Keeps the slots with the highest scores; subclasses fill in `score`.

    allocator: how the budget is spread over layers and heads.
    store: makes the storage of one layer; None: what the allocator says.
    """

    _old_names: ClassVar = {"voters": "n_window_queries", "tail": "query_window", "keeps_limit": "fills_budget"}
    _old_forms: ClassVar[dict[str, Callable[..., Any]]] = {}

    #: `score` is never -inf for a slot that is not padding, so every head keeps as many slots as it may
    fills_budget: ClassVar[bool] = False

    allocator: Allocator = field(default_factory=Uniform)
    store: Callable[..., Store] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt(cls, cls._old_names, cls._old_forms)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pair()

    @property
    def family(self) -> str:
        return "eviction" if self.store is None else "mixed"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [EvictionCache(self, prompt_len) for _ in range(spec.n_layers)]

    def config(self) -> dict[str, Any]:
        # a store factory is a functools.partial: shown as its target and arguments
        plain = replace(self, store=None)
        knobs = Method.config(plain)
        knobs["allocator"] = {"_target_": type(self.allocator).__name__, **knobs["allocator"]}
        if self.store is not None:
            target = getattr(self.store, "func", self.store)
            knobs["store"] = {"_target_": target.__name__, **getattr(self.store, "keywords", {})}
        return knobs

    @property
    def drops_later(self) -> bool:
        """Whether slots also go after the prompt's end."""
        return self.interval is not None

    def query_window(self, n: int) -> int:
        """How many of the newest queries of a prompt of n tokens `score` needs: its observation window."""
        return 0

    def slots(self, n: int) -> int:
        """Slots that a head keeps of a prompt of n tokens."""
        return slots(self.budget, n)

    def n_window_queries(self, store: Store, step: Step) -> int:
        """Of how many of the step's newest queries `observe` or `score` wants the attention, summed per slot.

        The step is in the store already. The sums come with the step's own output, for less than they cost alone.
        """
        return 0

    def observe(self, store: Store, step: Step, mass: Tensor | None) -> None:
        """Statistics after every step, in side arrays of the store; nothing unless overridden.

        mass [B, Hq, S]: the attention of these queries, slots in the order of `store.read`; None where there are none.
        """

    @property
    def interval(self) -> int | None:
        """Drop again after every so many tokens since the prompt; None: never."""
        return None

    def again(self, n: int, held: int) -> int:
        """Slots that a head keeps when it drops again; n: tokens of the prompt, held: slots that it holds."""
        return self.slots(n)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Scores [B, H, S], float32: the highest are kept, +inf always, -inf never.

        Neither padding nor rows that fit (`cut.kept_per_head` is what they hold) need be looked at.
        """
        raise NotImplementedError

    def before_drop(self, store: Store, keep: Tensor) -> None:
        """Called with the keep-mask [B, H, S] before slots go: the place to merge them into others."""

    def _check_pair(self) -> None:
        """Raises UserError for a store that cannot hold what this method and its allocator leave."""
        if self.store is None or self.budget == 1:
            return
        store = type(self.store(capacity=None))
        what = f"{self.name}: method.store={store.__name__} packs slots in groups"
        if store.heads_alike and not self.allocator.even:
            uneven = type(self.allocator).__name__
            raise UserError(
                f"{what}, whose heads hold alike; method.allocator={uneven} lets them differ: leave one out"
            )
        if store.heads_alike and self.drops_later:
            raise UserError(f"{what}, and this method drops single ones while it decodes; snapkv drops none then")


class EvictionCache(LayerCache):
    """One layer under an Eviction: the loop written once."""

    def __init__(self, method: Eviction, prompt_len: int | None):
        self.method = method
        make = method.store or method.allocator.new_store
        self.store = make(capacity=None if method.prompt_chunk(prompt_len or 0) else prompt_len)
        self.prompt_len = prompt_len
        self.prompt: list[int] = []  # tokens of each row's prompt, once it has ended
        self.kept_per_head: list[int] = []
        self.since: list[int] = []  # tokens of each row since it last had to drop
        self.tokens: list[int] = []  # that each row has read, once its prompt has ended; for sliding layers
        self.again = False  # whether a prompt has ended before
        self.dropped = False  # whether any slot has gone, so that heads may hold different numbers
        self.sees: int | None = None  # slots of a head that the next query of a sliding layer can see
        self.queries: list[tuple[Tensor, Tensor]] = []  # the newest ones, as many as `query_window` needs
        self.n_window_queries = 0  # of this step
        self.mass: Tensor | None = None  # their attention, until the step ends

    def append(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)
        self.n_window_queries = self.method.n_window_queries(self.store, step)

    def attend(self, step: Step) -> Tensor:
        if not self.n_window_queries:
            return self.store.attend(step)
        out, self.mass = self.store.attend_with_mass(step, self.n_window_queries)
        return out

    def end_step(self, step: Step) -> None:
        if self.n_window_queries and self.mass is None:  # the output was another cache's
            self.mass = self._shared_mass(step)
        self._observe(step)
        self._trim(step)
        self._remember(step)
        self._decide(step)
        if step.stage is not Stage.MID_PROMPT:  # packing is lossy, so a long prompt is packed once, whole
            self.store.pack(step)
        self.mass = None

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def workspace(self) -> Iterable[Tensor]:
        for pair in self.queries:
            yield from pair

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

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)
        self.queries = [(q[rows], pos[rows]) for q, pos in self.queries]
        sizes = (self.prompt, self.kept_per_head, self.since, self.tokens)
        self.prompt, self.kept_per_head, self.since, self.tokens = (taken(x, rows) for x in sizes)

    def _shared_mass(self, step: Step) -> Tensor:
        """The window queries' attention, computed once for all caches that hold the same whole prompt."""
        key = ("mass", self.n_window_queries, len(self.store))
        if self.kept_per_head:  # slots may have been dropped
            return self.store.mass(step, self.n_window_queries)
        if key not in step.memo:
            step.memo[key] = self.store.mass(step, self.n_window_queries)
        return step.memo[key]

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
        self._let_go(step, step.pos[:, -1] + 1)
        self.kept_per_head = self._kept_after_prompt(step)
        self.since = [0] * len(self.prompt)
        self._drop(step)
        self.queries, self.again = [], True

    def _kept_after_prompt(self, step: Step) -> list[int]:
        """Slots per head that each row keeps when the prompt ends."""
        share = self.method.allocator.slots
        return [min(n, share(step.layer, step.n_layers, self.method.slots(n))) for n in self.prompt]

    def _drop_again(self, step: Step, interval: int) -> None:
        """Down to the budget in the rows that have read `interval` tokens since they last were."""
        new = real_tokens(step)
        self.since = [n + m for n, m in zip(self.since, new, strict=True)]
        due = [n >= interval for n in self.since]
        if not any(due):
            return
        self.since = [0 if d else n for n, d in zip(self.since, due, strict=True)]
        self._let_go(step, (step.pos[:, -1] + 1).where(on_device(due, step.pos.device), 0))
        share, held = self.method.allocator.slots, self._count()
        again = [share(step.layer, step.n_layers, self.method.again(n, m)) for n, m in zip(self.prompt, held)]
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
        context = EvictionContext(q, q_pos, real, self.prompt, kept, budget_slots[:, None, None], self.mass, self.again)
        scores = self._scores(step, context)
        fits = [n == m for n, m in zip(kept, held, strict=True)]
        if any(fits):  # that another row must drop is no reason for this one to
            scores = scores.masked_fill(on_device(fits, real.device)[:, None, None], torch.inf)
        scores = scores.masked_fill(~real, -torch.inf)
        if step.stage is Stage.ENDS_PROMPT or scores.device.type == "cpu":  # elsewhere a look waits for the device
            check_scores(method.score, scores, real)
        keep = self._pick(scores, budget_slots)
        method.before_drop(store, keep)
        self.dropped = True
        store.lose([not fit for fit in fits])
        exact = min(kept) == max(kept) if known else bool((keep.sum(-1) == max(kept)).all())
        store.keep(keep, max(kept), exact=exact)
        if known:
            store.count(kept)

    def _scores(self, step: Step, cut: EvictionContext) -> Tensor:
        """The method's scores, [B, H, S]."""
        return self.method.score(self.store, step, cut)

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
