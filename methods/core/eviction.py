"""Methods that drop slots: what a subclass fills in; the loop around it is `evicting.layer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from kernels import Sums
from methods.core.allocate import Allocator, Uniform
from methods.core.budget import Budget
from methods.core.contract import LayerCache, Method, ModelSpec, Step
from methods.core.contract.spec import Shape
from methods.core.decision import EvictionContext
from methods.core.errors import NotHere, UserError
from methods.core.evicting.decode import EVERY, Decode
from methods.core.evicting.layer import EvictionCache
from methods.core.evicting.nulls import DRAWS, RANKS
from methods.core.evicting.pin import Pin
from methods.core.home.old_names import adopt
from methods.core.store import Store


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
    pin: slots that stay whatever they score; "none", "boundary" and "prompt" take the place of the method's own.
    score_by: what ranks the slots: "own", the method's score, or a null in its place: "random", "recency",
        "random_in_counts" (as many per layer and head as the score would keep, drawn at random).
    draw: of what is drawn: "fixed" numbers, or "fresh" ones at each cut.
    decode: cuts while decoding, in place of the method's own.
    """

    _old_names: ClassVar = {"voters": "n_window_queries", "tail": "query_window", "keeps_limit": "fills_budget"}
    _old_forms: ClassVar[dict[str, Callable[..., Any]]] = {}

    #: `score` is never -inf for a slot that is not padding, so every head keeps as many slots as it may
    fills_budget: ClassVar[bool] = False
    #: `score` draws its numbers, as `draw` says
    draws: ClassVar[bool] = False

    allocator: Allocator = field(default_factory=Uniform)
    store: Callable[..., Store] | None = None
    pin: Pin | str = field(default="own", kw_only=True)
    score_by: str = field(default="own", kw_only=True)
    draw: str = field(default="fixed", kw_only=True)
    decode: Decode = field(default_factory=Decode, kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt(cls, cls._old_names, cls._old_forms)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pin = Pin.of(self.pin)
        self._check_nulls()
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
        # what is not set is no part of a record's identity, which is older than these knobs
        knobs["pin"], knobs["decode"] = Pin.of(self.pin).plain(), self.decode.plain()
        unset = {"pin": "own", "score_by": "own", "draw": "fixed", "decode": {}}
        knobs = {key: value for key, value in knobs.items() if key not in unset or value != unset[key]}
        knobs["allocator"] = {"_target_": type(self.allocator).__name__, **knobs["allocator"]}
        if self.store is not None:
            target = getattr(self.store, "func", self.store)
            knobs["store"] = {"_target_": target.__name__, **getattr(self.store, "keywords", {})}
        return knobs

    @property
    def pins(self) -> Pin:
        """What `pin` names, or a cap while decoding that pins the prompt."""
        return Pin("prompt") if self.decode.pins_prompt else Pin.of(self.pin)

    @property
    def request(self) -> Budget:
        """What `budget` asks for, or the cap while decoding in its place."""
        return Budget(self.decode.cap, "method.decode.cap") if self.decode.cap else super().request

    @property
    def least(self) -> int:
        """Fewest slots that a head keeps, whatever the budget: those that the method protects, and one more."""
        return 0

    @property
    def drops_later(self) -> bool:
        """Whether slots also go after the prompt's end."""
        return self.interval is not None

    def planned_share(self, tokens: int, spec: Shape) -> float:
        return 1.0 if self.decode.pins_prompt else super().planned_share(tokens, spec)

    def query_window(self, n: int) -> int:
        """How many of the newest queries of a prompt of n tokens `score` needs: its observation window."""
        return 0

    def slots(self, n: int) -> int:
        """Slots that a head keeps of a prompt of n tokens."""
        return max(self.request.slots(n), self.least if self.pins.is_own else 1)

    def with_pins(self, kept: int, prompt: int) -> int:
        """Slots of a head whose budget leaves `kept`, of a prompt of so many tokens: never fewer than pins and one."""
        return self.pins.held(kept + prompt if self.decode.prompt_is_free else kept, prompt)

    def above_cap(self, held: int, prompt: int) -> int:
        """How many more slots than its cap a head holds when the prompt ends, below 0 for fewer; 0 without a cap.

        Raises UserError for a prompt that stays whole and fills the cap by itself.
        """
        if self.decode.cap is None:
            return 0
        self.decode.check_prompt(prompt)
        return held - self.with_pins(self.decode.cap, prompt)

    def n_window_queries(self, store: Store, step: Step) -> int:
        """Of how many of the step's newest queries `observe` or `score` wants the attention, summed per slot.

        The step is in the store already. The sums come with the step's own output, for less than they cost alone.
        """
        return 0

    def sums(self, store: Store, step: Step) -> Mapping[Hashable, Sums]:
        """Sums over the rows of the step's attention that `observe_sums` wants, by keys that say what they depend on.

        They come with the step's own output, from the same product q·k. Caches of a group that hold the same prompt and
        ask by the same key compute them once.
        """
        return {}

    def observe_sums(self, store: Store, step: Step, sums: Mapping[Hashable, Tensor]) -> None:
        """What was asked for, each [B, Hq, S], before `observe`; nothing unless overridden."""

    def block_size(self, n: int) -> int | None:
        """Queries of a block that `observe_block` wants of a prompt of n tokens; None: it wants none."""
        return None

    def observe_block(self, store: Store, step: Step, probs: Tensor, pos: Tensor) -> None:
        """The attention of whole blocks of a prompt's queries, of the row's own tokens, before `observe`.

        probs [B, H, G, size, S], float32, slots in the order of `store.read`; pos [B, size], -1 for rows without this
        block; the prompt's last block may be short. Blocks come in order, and whatever pieces the prompt comes in they
        are the same. Caches of a group that hold the same prompt compute them once; their probs are not to be changed.
        """
        raise NotImplementedError

    def observe(self, store: Store, step: Step, mass: Tensor | None) -> None:
        """Statistics after every step, in side arrays of the store; nothing unless overridden.

        mass [B, Hq, S]: the attention of these queries, slots in the order of `store.read`; None where there are none.
        """

    @property
    def interval(self) -> int | None:
        """Drop again after every so many tokens since the prompt; None: never."""
        if self.request.is_off:
            return None
        return self.decode.every or (EVERY if self.decode.cap else None)

    def again(self, n: int, held: int) -> int:
        """Slots that a head keeps when it drops again; n: tokens of the prompt, held: slots that it holds."""
        return self.request.number or self.slots(n)

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor | None:
        """The slots [B, H, S] that stay by the method's own rule, whatever they score: sinks, newest; None: none do."""
        return None

    def pinned(self, store: Store, step: Step, cut: EvictionContext) -> Tensor | None:
        """The slots [B, H, S] that stay whatever they score: the method's own, or those of `pin` in their place."""
        return self.protected(store, step, cut) if self.pins.is_own else self.pins.mask(store, cut)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Scores [B, H, S], float32: the highest are kept, -inf never. What stays in any case is `protected`.

        Neither padding nor rows that fit (`cut.kept_per_head` is what they hold) need be looked at.
        """
        raise NotImplementedError

    def before_drop(self, store: Store, keep: Tensor) -> None:
        """Called with the keep-mask [B, H, S] before slots go: the place to merge them into others."""

    def _check_nulls(self) -> None:
        """Raises UserError for pins, a null or cuts while decoding that cannot work."""
        if self.score_by not in RANKS:
            raise UserError(f"method.score_by={self.score_by}: it is one of {', '.join(RANKS)}")
        if self.draw not in DRAWS:
            raise UserError(f"method.draw={self.draw}: it is one of {', '.join(DRAWS)}")
        if self.draw != "fixed" and not self.draws and not self.score_by.startswith("random"):
            raise UserError(
                f"method.draw={self.draw}: {type(self).__name__} draws nothing; with method=random or "
                "method.score_by=random it works"
            )
        merges = type(self).before_drop is not Eviction.before_drop
        for key, value in (("pin", self.pins.at), ("score_by", self.score_by)):
            if merges and value != "own":
                raise NotHere(
                    f"method.{key}={value}: {type(self).__name__} merges what it drops into what it keeps, so there is "
                    f"no score by itself that a null could take the place of; leave method.{key} out"
                )
        self.decode.check(Budget(self.budget), Pin.of(self.pin).at)
        self.pins.check(self.request, self.drops_later)

    def _check_pair(self) -> None:
        """Raises UserError for a store that cannot hold what this method and its allocator leave."""
        if self.store is None or self.request.is_off:
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
