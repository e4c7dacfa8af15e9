"""The definition of selection: stable, so that at equal scores the lower slot wins."""

import torch
from torch import Tensor


def top(scores: Tensor, n: Tensor) -> Tensor:
    """Keep-mask of the n best slots per row: scores [..., S], n broadcastable to [...]; True is kept.

    Slots at -inf are never kept, even when fewer than n are left; at equal scores the lower slot wins.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [..., S]
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    wanted = (ranks < n[..., None]).expand(scores.shape)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, wanted)
    return keep & (scores > -torch.inf)


def lowest(scores: Tensor, pos: Tensor) -> tuple[Tensor, bool]:
    """What `kernels.select.lowest` gives."""
    real = pos >= 0
    scores = scores.masked_fill(~real, torch.inf)
    slot = torch.where(scores == scores.amin(-1, keepdim=True), pos, -1).argmax(-1)
    # elsewhere than on a CPU a look would wait for the device
    return slot, scores.device.type == "cpu" and bool((scores.isnan() | (scores == -torch.inf)).any())


def put(buffer: Tensor, slot: Tensor, value: Tensor) -> None:
    """What `kernels.select.put` does."""
    rows, heads = (torch.arange(n, device=slot.device) for n in slot.shape)
    buffer[rows[:, None], heads, slot] = value.to(buffer.dtype)


def compact(keep: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Slot numbers of the kept slots, ascending, and which of them are real: both [..., n].

    keep [..., S] with at most n True per row; rows with fewer are filled up with other slots, marked False.
    """
    rank = keep.cumsum(-1, dtype=torch.int32)  # [..., S], kept slots up to here
    slot = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device)
    index = torch.where(keep, rank - 1, rank[..., -1:] + slot - rank)  # the others go behind the kept ones, in order
    order = torch.empty_like(keep, dtype=torch.long).scatter_(-1, index.long(), slot.long().expand(keep.shape))[..., :n]
    return order, torch.arange(order.shape[-1], device=keep.device) < rank[..., -1:]
