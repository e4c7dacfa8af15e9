"""Q-Filters: keep the keys that lie along the direction that the head's queries share.

Paper: Godey et al. 2025, arXiv:2503.02812, section 3.
Idea:  the queries of a head scatter around one direction u, so a key's expected logit grows with <k, u>. u is found
       once per model, from the first right singular vector of queries on any text, turned so that queries project
       positively, averaged over the query heads of a KV head. Scoring a key is then one dot product: no attention map,
       no query. `qfilters` keeps the best of the prompt when it ends, and appends later tokens. `qfilters_capped` never
       holds more than its slots: after each step the lowest score outside the newest `window` tokens goes.
Here:  the model attends before anything is dropped, also where the release attends through a pruned cache; a prompt in
       chunks is not cut before its end, unless evict=per_chunk asks for it. Filters are stored as the direction itself,
       the release stores its negative, and the queries behind them are drawn with a seed. Capped slots are the budget's
       share of the prompt, or as many as given; the window is half of them, as in the release's demo. Sinks, window and
       one slot more always fit: a share below that is raised to it, and what may be held with it. Filters are made from
       generated documents and prose, or runner.data, in place of the Pile; the model's own number of documents is read,
       the release reads one less. In a sliding layer, slots that no later query sees go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from methods.core import artefacts
from methods.core.artefacts import Calibration
from methods.core.capped import Capped, CappedCache
from methods.core.capture import capture_steps
from methods.core.contract import LayerCache, ModelSpec, Step
from methods.core.errors import NotHere, UserError
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORE = "qfilters"  # the side array of scores
ROWS = 3000  # queries per head behind a filter: the paper's number
FLAGGED = 0.6  # of a head's queries project positively, or its filter is reported as doubtful
#: what a stored filter means: whether a key with a large product is kept or dropped
SIGNS = {"high is kept": 1.0, "low is kept": -1.0}


@dataclass
class Filtered(Eviction):
    """Drop slots by the product of their keys with one fixed vector per KV head.

    window: newest slots kept whatever their score; null: as many as the mode has by default.
    sinks: first slots kept whatever their score.
    skip: layers that keep everything.
    filters: "auto", the ones made for the model, or a file that runner=calibrate wrote.
    """

    fills_budget: ClassVar[bool] = True

    window: int | None = None
    sinks: int = 0
    skip: list[int] = field(default_factory=list)
    filters: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0 or (self.window or 0) < 0:
            raise UserError(f"QFilters: method.sinks={self.sinks}, method.window={self.window}; both are at least 0")
        if self.request.within(self.sinks + (self.window or 0)) and self.pins.is_own:
            raise NotHere(
                f"QFilters: {self.request} slots do not hold method.sinks={self.sinks}, "
                f"method.window={self.window} and one more; raise budget or lower these"
            )
        if any(not isinstance(layer, int) or layer < 0 for layer in self.skip):
            raise UserError(f"QFilters: method.skip={self.skip}; give layers counted from 0, such as method.skip=[0,1]")

    def prepare(self, model: PreTrainedModel) -> Tensor:
        """The model's filters, [L, H, D], float32: keys with a large product are kept."""
        path = None if self.filters == "auto" else self.filters
        artefact = artefacts.load("qfilters", "filters", model, path)
        sign = artefact.card.get("sign_convention")
        if sign not in SIGNS or "filters" not in artefact.tensors:
            raise UserError(
                f"QFilters: {artefacts.shown(artefact.path)} does not say whether high or low is kept: its card's "
                f"sign_convention is {sign}; it is one of {', '.join(SIGNS)}"
            )
        return SIGNS[sign] * artefact.tensors["filters"].float().to(model.device)

    def calibrate(  # type: ignore[override]
        self, model: PreTrainedModel, rows: Sequence[Tensor], seed: int, n_rows: int = ROWS, route: str = "eigen"
    ) -> Calibration:
        """The model's filters, from `n_rows` of the queries that it attends with while it reads the rows of tokens.

        route: "eigen" of the queries' second moments, or "svd" of the queries themselves; the same vectors.
        """
        if route not in ("eigen", "svd"):
            raise UserError(f"QFilters: runner.options.route={route}; it is eigen or svd")
        queries = sample_queries(model, rows, n_rows, seed)
        if queries[0].shape[1] < queries[0].shape[2]:
            raise UserError(
                f"QFilters: {queries[0].shape[1]} queries for vectors of {queries[0].shape[2]} numbers are too few; "
                "raise runner.documents, runner.tokens or runner.options.n_rows"
            )
        heads = [principal(x, route) for x in queries]  # one per layer
        n_kv_heads = capture_steps(model, rows[0][:, :1])[0].k.shape[1]
        filters = torch.stack([one.direction.unflatten(0, (n_kv_heads, -1)).mean(1) for one in heads])  # [L, H, D]
        positive = torch.stack([one.positive for one in heads])  # [L, Hq]
        facts = {
            "rows": queries[0].shape[1],
            "route": route,
            "sign_convention": "high is kept",
            "positive_share": [[round(share, 4) for share in layer] for layer in positive.tolist()],
            "mean_projection": [[round(x, 3) for x in one.projection.tolist()] for one in heads],
        }
        return Calibration("qfilters", "filters", {"filters": filters}, facts, report(positive))

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        filters = spec.prepared
        needed = (spec.n_layers, spec.n_kv_heads, spec.head_dim)
        if tuple(filters.shape) != needed:
            raise UserError(
                f"QFilters: the filters have the shape {list(filters.shape)}, {spec.name} needs {list(needed)}"
            )
        if self.skip and max(self.skip) >= spec.n_layers:
            raise UserError(f"QFilters: method.skip={self.skip}; {spec.name} has layers 0 to {spec.n_layers - 1}")
        whole = replace(self, budget=1.0)
        return [self.layer(prompt_len, one) if i not in self.skip else EvictionCache(whole, prompt_len)
                for i, one in enumerate(filters)]  # fmt: skip

    def layer(self, prompt_len: int | None, filters: Tensor) -> LayerCache:
        """The cache of a layer with these filters [H, D]."""
        raise NotImplementedError

    @property
    def least(self) -> int:
        return self.sinks + (self.window or 0) + 1

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Products of keys and filter, [B, H, S]."""
        return store.track(SCORE)

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Sinks and the newest."""
        pos, newest = store.pos, step.pos[:, -1:, None]  # [B, H, S], [B, 1, 1]
        return (pos < self.sinks) | (pos > newest - self.n_newest(cut))

    def n_newest(self, cut: EvictionContext) -> int | Tensor:
        """How many of the newest stay, an int or [B, 1, 1]."""
        return self.window or 0


@dataclass
class QFilters(Filtered):
    """Drop prompt slots once, when the prompt ends; null `window` is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if given := {key: value for key, value in self.decode.plain().items() if key != "prompt"}:
            key, value = next(iter(given.items()))
            raise NotHere(
                f"method.decode.{key}={value}: QFilters forgets the prompt's scores once they have "
                "decided; method=qfilters_capped drops while decoding"
            )

    def layer(self, prompt_len: int | None, filters: Tensor) -> LayerCache:
        return OneShotCache(self, prompt_len, filters)


@dataclass
class CappedQFilters(Capped, Filtered):
    """Never hold more slots than the budget; null `window` is half of them."""

    def layer(self, prompt_len: int | None, filters: Tensor) -> LayerCache:
        return CappedFilteredCache(self, prompt_len, filters)

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return Filtered.caches(self, spec, prompt_len)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        return Filtered.score(self, store, step, cut)

    def n_newest(self, cut: EvictionContext) -> int | Tensor:
        return (cut.budget_slots - self.sinks) // 2 if self.window is None else self.window


class FilteredCache(EvictionCache):
    """One layer that scores every key once, when it comes in."""

    def __init__(self, method: Any, prompt_len: int | None, filters: Tensor):
        """filters [H, D]: of this layer."""
        super().__init__(method, prompt_len)
        self.filters = filters

    def append(self, step: Step) -> None:
        free_slot, n = self.store.free_slot, len(self.store)
        super().append(step)
        new = score_keys(step.k, self.filters)  # [B, H, T]
        scores = new.new_zeros(*new.shape[:2], len(self.store))
        if free_slot is not None:
            scores.scatter_(2, free_slot[..., None], new[:, :, :1])
            new = new[:, :, 1:]
        scores[:, :, n:] = new
        self.store.add(SCORE, scores)

    def adapters(self) -> Iterable[Tensor]:
        return (self.filters,)


class OneShotCache(FilteredCache):
    """One layer that forgets the scores once they have decided."""

    def append(self, step: Step) -> None:
        if self.prompt:
            EvictionCache.append(self, step)
        else:
            super().append(step)

    def _end_prompt(self, step: Step) -> None:
        if self.prompt:  # a later prompt's end: what stayed has no scores any more
            self.store.add(SCORE, score_keys(self.store.read()[0], self.filters))
        super()._end_prompt(step)
        self.store.forget(SCORE)


class CappedFilteredCache(FilteredCache, CappedCache):
    """One layer whose next token takes the place of the lowest score."""


class Direction(NamedTuple):
    """What the queries of some heads share.

    direction [h, D]: of length 1, most queries project positively on it.  positive [h]: their share.  projection [h]:
    the mean projection.
    """

    direction: Tensor
    positive: Tensor
    projection: Tensor


def principal(x: Tensor, route: str = "eigen") -> Direction:
    """The first right singular vector of each head's queries x [h, N, D], float32, turned towards most of them."""
    if route == "svd":
        v = torch.linalg.svd(x, full_matrices=False).Vh[:, 0]  # [h, D]
    else:
        moments = x.double().mT @ x.double()  # [h, D, D]
        v = torch.linalg.eigh(moments).eigenvectors[..., -1].float()
    projection = (x @ v[..., None]).squeeze(-1)  # [h, N]
    sign = torch.where((projection > 0).float().mean(-1) > 0.5, 1.0, -1.0)  # [h]
    projection = projection * sign[:, None]
    return Direction(v * sign[:, None], (projection > 0).float().mean(-1), projection.mean(-1))


def sample_queries(model: PreTrainedModel, rows: Sequence[Tensor], n: int, seed: int) -> list[Tensor]:
    """For each layer, n of the queries that each head attends with in rows [1, T], all of them if there are fewer.

    [Hq, n, D], float32, on the CPU; drawn without replacement, another set in every layer, the same for all its heads.
    """
    total = sum(row.shape[1] for row in rows)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []  # per layer, ascending
    taken: list[list[Tensor]] = []
    start = 0
    for row in rows:
        steps = capture_steps(model, row)
        if not drawn:
            drawn = [torch.randperm(total, generator=generator)[:n].sort().values for _ in steps]
            taken = [[] for _ in steps]
        for step, ours, into in zip(steps, drawn, taken, strict=True):
            here = ours[(ours >= start) & (ours < start + row.shape[1])] - start
            into.append(step.q[0, :, here.to(step.q.device)].float().cpu())
        start += row.shape[1]
    return [torch.cat(parts, dim=1) for parts in taken]


def score_keys(k: Tensor, filters: Tensor) -> Tensor:
    """Products of keys k [B, H, T, D] with their head's filter [H, D]: [B, H, T], float32."""
    return (k.float() @ filters.to(k.device)[..., None]).squeeze(-1)


def report(positive: Tensor) -> list[str]:
    """Lines that say for how many of a head's queries its filter stands; positive [L, Hq]: their shares."""
    lines = [f"{'layer':>5}  queries that project positively, per head"]
    lines += [f"{i:>5}  {'  '.join(f'{share:6.1%}' for share in layer)}" for i, layer in enumerate(positive.tolist())]
    doubtful = (positive < FLAGGED).nonzero().tolist()
    if doubtful:
        named = ", ".join(f"{layer}.{head}" for layer, head in doubtful)
        lines.append(f"doubtful, below {FLAGGED:.0%} (layer.head): {named}")
    return lines
