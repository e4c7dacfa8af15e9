"""Keyformer: keep recent tokens and key tokens, whose noisy attention adds up to the most.

Paper: Adnan et al. 2024, arXiv:2403.09054, section 3 and Algorithm 1.
Idea:  dropping tokens shifts the softmax towards those that stay. The sums that choose key tokens are therefore taken
       over another softmax than the model's: its logits carry Gumbel noise, and its temperature rises from tau_init in
       the prompt to tau_end after `new_tokens` steps. Once when the prompt ends, then one token per step; the budget is
       a share of the prompt and generated tokens compete for the same slots.
Here:  the paper's rule, not the release's masks, which lose every token that leaves the recent window
       (compat=official_mask does what they amount to). Query heads that share a KV head add their rows. Samples choose
       for themselves; the release adds up batch and beams. Noise is keyed by (seed, sample, layer, head, query, key),
       noise=per_token leaves the query out. The paper's temperature reaches tau_end with the last token that a task may
       generate. Here the number is a knob, 128 as in the release's summaries, whatever the task is: an answer of at
       most 16 tokens ends at 1.13, one of 64 at 1.5, and beyond `new_tokens` the temperature stays (the task's
       max_new_tokens as method.new_tokens follows the paper). budget=1 drops nothing while decoding either; the paper's
       cache of a whole prompt then drops a token per step. At least one slot stays. Keys keep their positions; the
       variant that numbers slots anew is not here. shared=true adds up all layers and keeps one set, so that a step's
       slots are freed only when its last layer has run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Stem, Sums, noisy_mass, noisy_rows
from methods.core.capped import Capped, CappedCache, whole_slots
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import EvictionContext
from methods.core.store import Store

NOISE = ("fresh", "per_token", "none")


@dataclass
class Keyformer(Capped):
    """A cache of fixed size: key tokens and recent tokens.

    recent: share of the budget for the newest tokens, cut to whole slots.
    noise: "fresh" for every query and key, "per_token", or "none".
    tau_init, tau_end: temperature in the prompt and after `new_tokens` tokens.
    shared: one score and one kept set for all layers.
    compat: "official_mask" or null.
    """

    recent: float = 0.3
    noise: str = "fresh"
    tau_init: float = 1.0
    tau_end: float = 2.0
    new_tokens: int = 128
    shared: bool = False
    compat: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise UserError(f"Keyformer: method.recent={self.recent}; it is a share of the budget in [0, 1]")
        if self.noise not in NOISE:
            raise UserError(f"Keyformer: method.noise={self.noise}; there are {', '.join(NOISE)}")
        if not 0 < self.tau_init <= self.tau_end or self.new_tokens < 1:
            raise UserError(
                f"Keyformer: method.tau_init={self.tau_init}, method.tau_end={self.tau_end}, "
                f"method.new_tokens={self.new_tokens}; 0 < tau_init <= tau_end, and at least one new token"
            )
        if self.compat not in (None, "official_mask"):
            raise UserError(f"Keyformer: method.compat={self.compat}; it is null or official_mask")

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [KeyformerCache(self, prompt_len) for _ in range(spec.n_layers)]

    def end_pass(self, caches: Sequence[LayerCache], step: Step) -> None:
        """shared=true: the rows of all layers have been added up, and decide for each of them."""
        if not self.shared or self.request.is_off:
            return
        rows = caches[-1].scratch["rows"]
        for cache in caches:
            assert isinstance(cache, KeyformerCache)
            cache.store.add("score", rows)
            CappedCache._decide(cache, step)

    def slots(self, n: int) -> int:
        return min(n, self.capacity(n)) if self.request.number else self._without_gap(super().slots(n))

    def capacity(self, n: int) -> int:
        return self._without_gap(self.request.number) if self.request.number else self.slots(n)

    def tau(self, t: Tensor) -> Tensor:
        """Temperature of the t-th new token, counted from 1; 0 is the prompt."""
        return self.tau_init + t.clamp(0, self.new_tokens) * ((self.tau_end - self.tau_init) / self.new_tokens)

    def n_window_queries(self, store: Store, step: Step) -> int:
        if self.request.is_off:
            return 0
        if step.stage is Stage.DECODE:
            return 1
        return step.q.shape[2] if self.noise == "none" and self.tau_init == 1 and _in_prompt(step) else 0

    def stem(self, step: Step) -> Stem | None:
        """Keys of the noise but for the query's and the slots' positions: seed, sample, layer, head, [B, Hq, 1]."""
        if self.noise == "none":
            return None
        layer = torch.full_like(step.samples, step.layer)
        heads = torch.arange(step.q.shape[1], device=step.q.device)[:, None]
        return Stem.of(self.seed, step.samples[:, None, None], layer[:, None, None], heads)

    def sums(self, store: Store, step: Step) -> Mapping[Hashable, Sums]:
        """In a prompt the noisy softmax comes with the plain one, from the same product q·k."""
        if self.request.is_off or not _in_prompt(step) or self.n_window_queries(store, step):
            return {}
        return {("keyformer", self.seed, self.noise, self.tau_init): self.asked(step, self.stem(step), None)}

    def asked(self, step: Step, stem: Stem | None, t: Tensor | None) -> Sums:
        """The sum over the step's queries that chooses key tokens; stem, t as in `rows`."""
        if stem is not None and self.noise == "fresh":
            stem = stem.then(step.pos[:, None])
        return Sums(stem=stem, tau=self.tau_init if t is None else self.tau(t))

    def rows(self, store: Store, step: Step, mass: Tensor | None, stem: Stem | None, t: Tensor | None) -> Tensor:
        """Noisy attention of the step's queries, summed over them and over the heads of a group: [B, H, S].

        mass: in the prompt `asked`, while decoding the query's plain attention.  stem: keys of the noise but for the
        query's and the slots' positions, [B, Hq, 1].  t [B, T]: how many tokens after the prompt each query is; None in
        the prompt.
        """
        B, H, S = store.pos.shape
        if mass is None:
            one = self.asked(step, stem, t)
            at = {"q_pos": step.pos, "k_pos": store.pos, "layout": store.layout(step.q.shape[2])}
            mass = noisy_mass(step.q, store.read()[0], step.rules, one.stem, **at, tau=one.tau)
        elif t is not None and stem is not None:
            query = step.pos[:, 0] if self.noise == "fresh" else None
            return noisy_rows(mass, stem, store.pos, self.tau(t)[:, 0], query)
        elif t is not None:
            weight = mass.pow(1 / self.tau(t)[:, :, None])
            mass = weight / weight.sum(-1, keepdim=True)
        return mass.view(B, H, -1, S).sum(dim=2)

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Noisy attention collected so far."""
        score = store.track("score")
        if self.compat and self.pins.is_own:  # the token that has just left the recent ones
            left = store.pos == step.pos[:, -1:, None] - self.n_recent(cut)
            score = score.masked_fill(left, torch.finfo(score.dtype).min)
        return score

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The newest."""
        return store.pos > step.pos[:, -1:, None] - self.n_recent(cut)

    def n_recent(self, cut: EvictionContext) -> Tensor:
        """How many of the newest stay, [B, 1, 1]."""
        slots = cut.budget_slots + 1 if self.compat else cut.budget_slots
        return whole_slots(self.recent, slots) - (1 if self.compat else 0)

    def _without_gap(self, n: int) -> int:
        """Slots; the release's masks show one less, the token that is about to leave the recent window."""
        return max(1, n - 1) if self.compat and not self.request.is_off else n


class KeyformerCache(CappedCache):
    """One layer of key tokens and recent tokens, which knows how far behind its prompt a token is."""

    method: Keyformer

    def __init__(self, method: Keyformer, prompt_len: int | None):
        super().__init__(method, prompt_len)
        self.began: Tensor | None = None  # tokens of each row's prompt, [B, 1]
        self.stem: Stem | None = None  # of the noise: seed, sample, layer and head, [B, Hq, 1]

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if self.began is not None:
            self.began = self.began.index_select(0, rows)
        if self.stem is not None:
            self.stem = Stem(self.stem.state.index_select(0, rows))

    def _observe(self, step: Step) -> None:
        if self.method.request.is_off:
            return
        t = None if _in_prompt(step) or self.began is None else step.pos - self.began + 1
        mass = next(iter(self.sums.values()), self.mass)  # in the prompt the noisy sum, else the query's attention
        rows = self.method.rows(self.store, step, mass, self._stem(step), t)
        if step.stage is Stage.ENDS_PROMPT:
            self.began = step.pos[:, -1:] + 1
        if not self.method.shared:
            self.store.add("score", rows)
            return
        if step.rules.window is not None:
            raise UserError(
                "Keyformer: method.shared=true needs layers that see the same tokens, and some of this model slide; "
                "method.shared=false works"
            )
        # handed on from layer to layer; the last one has the sum
        self.scratch["rows"] = rows + self.below(step.layer - 1).scratch.pop("rows") if step.layer else rows

    def _stem(self, step: Step) -> Stem | None:
        """The same for all steps of a sequence."""
        if self.stem is None:
            self.stem = self.method.stem(step)
        return self.stem

    def _decide(self, step: Step) -> None:
        if not self.method.shared or self.method.request.is_off:
            super()._decide(step)  # else at the end of the pass


def _in_prompt(step: Step) -> bool:
    return step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT)
