"""A method that reads a few pages of what it holds, by upper bounds of their keys: as small as such a method can be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reads
from methods.core.contract import Holding, LayerCache, ModelSpec, Step
from methods.core.selecting.layer import SelectiveCache
from methods.core.selecting.method import Selective


@dataclass
class Paged(Selective):
    """page: tokens of one.  pages: that a query head reads, the current one among them.  per_group: one choice for all
    query heads of a KV head.  on_host: values lie on the host, and those of the chosen pages are fetched."""

    page: int = 4
    pages: int = 2
    per_group: bool = False
    on_host: bool = False

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [PagedCache(self, prompt_len) for _ in range(spec.n_layers)]


class PagedCache(SelectiveCache):
    method: Paged
    low = high = at = None  # bounds [B, H, N, D]; the slot of each position, [B, N * page], -1: none

    def observe(self, step: Step) -> None:
        (B, H, _, D), P, pos = step.k.shape, self.method.page, step.pos.long()
        n = -(-len(self.store) // P)
        if self.low is None:
            self.low, self.high = step.k.new_empty(B, H, 0, D), step.k.new_empty(B, H, 0, D)
            self.at = pos.new_empty(B, 0)
        more = n - self.low.shape[2]
        self.low = F.pad(self.low, (0, 0, 0, more), value=torch.inf)
        self.high = F.pad(self.high, (0, 0, 0, more), value=-torch.inf)
        self.at = F.pad(self.at, (0, more * P), value=-1)
        there, place = (pos >= 0)[:, None, :, None], pos.clamp_min(0)
        page = (place // P)[:, None, :, None].expand(step.k.shape)
        self.low.scatter_reduce_(2, page, step.k.masked_fill(~there, torch.inf), "amin")
        self.high.scatter_reduce_(2, page, step.k.masked_fill(~there, -torch.inf), "amax")
        slot = torch.arange(len(self.store) - pos.shape[1], len(self.store), device=pos.device).where(pos >= 0, -1)
        self.at.scatter_reduce_(1, place, slot, "amax")

    def pick(self, step: Step) -> Tensor:
        B, P, H = len(step.q), self.method.page, self.low.shape[1]
        slots = self.at.view(B, -1, P)  # [B, N, P]
        real = (slots >= 0).any(-1)  # [B, N]
        reads.note(self.low, self.high, there=real[:, None])
        q = step.q.unflatten(1, (H, -1)).flatten(2, 3).float()  # [B, H, G * T, D]
        low, high = (x.float().masked_fill(~real[:, None, :, None], 0) for x in (self.low, self.high))
        u = q.clamp_min(0) @ high.mT + q.clamp_max(0) @ low.mT  # [B, H, G * T, N]
        u = u.unflatten(2, (-1, step.q.shape[2])).amax(3)  # [B, H, G, N]: one choice for all tokens of a step
        u = u.amax(2) if self.method.per_group else u.flatten(1, 2)
        u = u.masked_fill(~real[:, None], -torch.inf)
        now = (step.pos.amax(-1).clamp_min(0) // P).long()[:, None, None].expand(*u.shape[:2], 1)
        best = u.scatter(2, now, torch.inf).topk(min(self.method.pages, u.shape[-1])).indices  # [B, h, n]
        heads = slots[:, None].expand(-1, best.shape[1], -1, -1)
        at = heads.gather(2, best[..., None].expand(*best.shape, P)).flatten(2)
        if self.method.on_host:
            of_heads = self.store.v.repeat_interleave(at.shape[1] // H, dim=1)
            fetched = of_heads.gather(2, at.clamp_min(0)[..., None].expand(*at.shape, of_heads.shape[-1]))
            reads.moved(fetched, there=at >= 0)
        return at

    def tensors(self) -> Iterable[Tensor]:
        yield from self.store.tensors()
        yield from () if self.low is None else (self.low, self.high, self.at)

    def holding(self) -> Holding:
        one = super().holding()
        H, P = self.store.k.shape[1], self.method.page
        counts = [n // H for n in self.store.counted()]
        if self.low is not None:
            size = 2 * H * self.low.shape[-1] * self.low.element_size() + 8 * P
            mine = [-(-n // P) * size for n in counts]
            one.held, one.beside = ([a + b for a, b in zip(x, mine)] for x in (one.held, one.beside))
            one.padding = [a + self.low.shape[2] * size - b for a, b in zip(one.padding, mine)]
        if self.method.on_host:
            one.host = [n * H * self.store.v.shape[-1] * self.store.v.element_size() for n in counts]
        return one

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if self.low is not None:
            self.low, self.high, self.at = (x.index_select(0, rows) for x in (self.low, self.high, self.at))
