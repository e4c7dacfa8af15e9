"""Queries that were drawn before the prompt came."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import uniform
from methods.core.contract import Step


def drawn_rows(step: Step, seed: int, count: Tensor, among: Tensor, again: bool = False) -> Tensor:
    """How often each of the step's queries was drawn, [B, T], float32: weights for `Sums`.

    Of each row's first `among` [B] positions `count` [B] are drawn, none twice, or with again=True each anew. They are
    keyed by seed, sample, layer and position, so that they were drawn before the prompt came, in whatever pieces.
    """
    count, among = count.clamp_min(0), among.clamp_min(0)  # of a row of which only padding has come
    B, most = len(step.q), max(1, int(among.max()))
    here = torch.arange(most, device=step.pos.device)
    layer = torch.tensor(step.layer, device=step.pos.device)
    numbers = uniform(seed, step.samples.to(here.device)[:, None], layer, here)  # [B, most]
    count, among = count.to(here.device)[:, None], among.to(here.device)[:, None]
    if again:
        draws = max(1, int(count.max()))
        index = torch.arange(draws, device=here.device)
        place = (uniform(seed, step.samples.to(here.device)[:, None], layer, index) * among).long()  # [B, draws]
        times = torch.zeros_like(numbers).scatter_add(1, place.clamp_max(most - 1), (index < count).float())
    else:
        order = numbers.masked_fill(here >= among, torch.inf).argsort(dim=1, stable=True)
        times = torch.zeros_like(numbers).scatter(1, order, (here < torch.minimum(count, among)).float())
    pos = step.pos.long()
    inside = (pos >= 0) & (pos < most)
    return times.expand(B, -1).gather(1, pos.clamp(0, most - 1)) * inside
