"""Tensors that become a store's own."""

import torch
from torch import Tensor


def own(x: Tensor) -> Tensor:
    """x itself when it fills its storage, else a copy: a view would keep a larger tensor alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def gathered(x: Tensor, slots: Tensor) -> Tensor:
    """The slots [B, H, n] of x [B, H or 1, S, ...] in new memory."""
    if x.dim() == 3:
        return x.expand(-1, slots.shape[1], -1).gather(2, slots)
    return x.gather(2, slots.view(*slots.shape, *(1,) * (x.dim() - 3)).expand(*slots.shape, *x.shape[3:]))
