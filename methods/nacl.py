"""NACL: keep what the end of the prompt attends to, and a random sample of the rest.

Paper: Chen et al. 2024, arXiv:2408.03675, section 3 and Algorithm 1.
Idea:  once, when the prompt ends, every head keeps (a) the first and the newest tokens, (b) the top slots by the
       attention that the last `proxy` queries give them, (c) a random sample of the others, drawn without replacement
       from the softmax of the same scores. Later tokens are appended.
Here:  query heads that share a KV head add their scores. The sample is drawn by Gumbel-top-k with noise keyed by (seed,
       sample, layer, head, position). The paper protects beginning and end without saying how much of each: half and
       half, at most 256 first tokens. Proxies attend causally among themselves (the release lets early ones see later
       ones: proxy_causal=false) and compete for slots like any other token, as the paper's Table 4 has it; its text
       always keeps them. No prompt is too short to be cut (the release: min_len=2048). With decode_interval the newest
       `decode_interval` queries score, or as many as there are proxies if these are fewer, since the prompt's are gone;
       every draw is a new one. Counts are cut, not rounded, so up to three slots of the budget stay unused; where none
       would be left, the newest is kept.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import gumbel, mass, top
from methods.core.budget import slots
from methods.core.capped import whole_slots
from methods.core.contract import Stage, Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionContext
from methods.core.store import Store

#: shares of the budget (protected, by score, by chance) and of the prompt (proxy queries): from the paper's Table 4
#: and text, and the release's defaults
PRESETS = {"paper": (0.10, 0.30, 0.60, 0.20), "code": (0.05, 0.60, 0.35, 0.01)}
MAX_SINKS = 256  # the release's number of first tokens


class Sizes(NamedTuple):
    """Tokens of one prompt by role; the first four are kept, `proxies` queries score."""

    sinks: int
    recent: int
    by_score: int
    by_chance: int
    proxies: int

    @property
    def kept(self) -> int:
        """Slots that stay per head."""
        return self.sinks + self.recent + self.by_score + self.by_chance


@dataclass
class NACL(Eviction):
    """Drop prompt slots once, by proxy queries and by chance.

    preset: "paper" or "code", the shares below that are null.
    protect, by_score, by_chance: shares of the budget; they add up to at most 1.
    proxy: share of the prompt whose queries score.
    temperature: of the softmax that the sample is drawn from.
    min_len: prompts up to this length are kept whole.
    proxy_causal: a proxy query does not see the tokens after it.
    decode_interval: tokens after which the same eviction runs again; null: never, as in the release.
    """

    preset: str = "paper"
    protect: float | None = None
    by_score: float | None = None
    by_chance: float | None = None
    proxy: float | None = None
    temperature: float = 1.0
    min_len: int = 0
    proxy_causal: bool = True
    decode_interval: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise UserError(f"NACL: method.preset={self.preset}; there are {', '.join(PRESETS)}")
        protect, by_score, by_chance, proxy = self.shares
        if min(protect, by_score, by_chance) < 0 or protect + by_score + by_chance > 1 + 1e-9 or not 0 < proxy <= 1:
            raise UserError(
                f"NACL: method.protect={protect}, method.by_score={by_score}, method.by_chance={by_chance}, "
                f"method.proxy={proxy}; the first three are shares of the budget that add up to at most 1, "
                "proxy is a share of the prompt in (0, 1]"
            )
        if self.temperature <= 0:
            raise UserError(f"NACL: method.temperature={self.temperature}; it is above 0")
        if self.min_len < 0:
            raise UserError(f"NACL: method.min_len={self.min_len}; it is a number of tokens, at least 0")
        if self.decode_interval is not None and self.decode_interval < 1:
            raise UserError(f"NACL: method.decode_interval={self.decode_interval}; it is null or at least 1")
        if self.decode_interval and self.decode.every:
            raise UserError(
                f"NACL: method.decode_interval={self.decode_interval}, method.decode.every={self.decode.every}; they "
                "say the same, give one"
            )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """protect, by_score, by_chance of the budget and proxy of the prompt."""
        given = (self.protect, self.by_score, self.by_chance, self.proxy)
        protect, by_score, by_chance, proxy = (
            preset if share is None else share for share, preset in zip(given, PRESETS[self.preset], strict=True)
        )
        return protect, by_score, by_chance, proxy

    def sizes(self, n: int) -> Sizes:
        """Tokens by role for a prompt of n tokens that is not kept whole."""
        *kept, proxy = self.shares
        of = 1 if self.request.number else n
        # 0.29 * 100 is 28.999999999999996
        protected, by_score, by_chance = (int(share * self.request.typed * of + 1e-9) for share in kept)
        sinks = min(MAX_SINKS, protected // 2)
        recent = (
            protected - sinks if protected + by_score + by_chance else 1
        )  # a head without any slot could not attend
        return Sizes(sinks, recent, by_score, by_chance, max(1, slots(proxy, n)))

    def whole(self, n: int) -> bool:
        """Whether nothing of n tokens goes."""
        return self.request.is_off or n <= max(self.min_len, self.request.number or 0)

    @property
    def interval(self) -> int | None:
        return self.decode_interval or super().interval

    def query_window(self, n: int) -> int:
        return self.sizes(n).proxies

    def slots(self, n: int) -> int:
        return n if self.whole(n) else self.sizes(n).kept

    def again(self, n: int, held: int) -> int:
        return held if self.whole(held) else self.sizes(n).kept

    def n_window_queries(self, store: Store, step: Step) -> int:
        n = len(store)
        if step.stage is not Stage.ENDS_PROMPT or store.padded or step.rules.window is not None or self.slots(n) >= n:
            return 0
        if int(step.seen.max()) + step.q.shape[2] > n:  # cut before: how many proxies score goes by all tokens
            return 0
        proxies = self.sizes(n).proxies
        return proxies if self.proxy_causal and proxies <= step.q.shape[2] else 0

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """[B, H, S]: 1 for what is kept, -inf for the rest; the choice is NACL's own."""
        k, _ = store.read()  # [B, H, S, D]
        B, H, S, _ = k.shape
        rows = [self.sizes(n) for n in cut.prompt]
        by_score, by_chance, proxies = (
            torch.tensor(column, device=k.device)[:, None, None] for column in list(zip(*rows, strict=True))[2:]
        )  # each [B, 1, 1]
        scores = self.proxy_scores(store, step, cut, proxies[:, 0]).view(B, H, -1, S).sum(dim=2)  # [B, H, S]

        pinned = self.pinned(store, step, cut)
        pinned = torch.zeros_like(cut.real) if pinned is None else pinned
        if not self.pins.is_own:  # what is left is shared as the two shares are among themselves
            left = (cut.budget_slots - pinned.sum(-1, keepdim=True)).clamp_min(0)  # [B, H, 1]
            scored, drawn = self.shares[1:3]
            by_score = whole_slots(scored / (scored + drawn), left) if scored + drawn else left
            by_chance = left - by_score
        others = (cut.age_rank >= 0) & ~pinned
        best = top(scores.masked_fill(~others, -torch.inf), by_score[..., 0])
        heads = torch.arange(H, device=k.device)[None, :, None]
        layer = torch.full_like(heads, step.layer)
        # a later draw is another one
        drawn_at = (step.pos[:, -1:, None],) if cut.again else ()
        noise = gumbel(self.seed, step.samples[:, None, None], layer, heads, store.pos, *drawn_at)
        chosen = top((scores / self.temperature + noise).masked_fill(~others | best, -torch.inf), by_chance[..., 0])
        return torch.where(pinned | best | chosen, 1.0, -torch.inf)

    def protected(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """The first and the newest."""
        rows = [self.sizes(n) for n in cut.prompt]
        sinks, recent = (
            torch.tensor(column, device=store.pos.device)[:, None, None] for column in list(zip(*rows, strict=True))[:2]
        )
        return (cut.age_rank >= 0) & ((cut.age_rank < sinks) | (cut.age_rank >= cut.n - recent))

    def proxy_scores(self, store: Store, step: Step, cut: EvictionContext, proxies: Tensor) -> Tensor:
        """Attention that the last `proxies` [B, 1] queries of each row give every slot, [B, Hq, S]."""
        if cut.mass is not None:
            return cut.mass
        k, _ = store.read()
        newest = cut.q_pos[:, -1:]  # [B, 1]
        longest = min(cut.q.shape[2], max(self.sizes(n).proxies for n in cut.prompt))
        q, q_pos = cut.q[:, :, -longest:], cut.q_pos[:, -longest:]
        q_pos = torch.where(q_pos > newest - proxies, q_pos, -1)  # a shorter row has fewer proxies
        if not self.proxy_causal:
            q_pos = torch.where(q_pos >= 0, newest, -1)
        layout = store.layout(q.shape[2]) if self.proxy_causal else "positions"
        return mass(q, k, step.rules, q_pos=q_pos, k_pos=store.pos, layout=layout)
