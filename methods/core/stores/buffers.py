"""Tensors that become a store's own."""

import torch
from torch import Tensor

from methods.core.binding.rounding import FLOAT16_END
from methods.core.errors import UserError


def own(x: Tensor) -> Tensor:
    """x itself when it fills its storage, else a copy: a view would keep a larger tensor alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def fitting(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is held. Raises UserError where float16 does not hold it; waits for the device only then."""
    if dtype == torch.float16 and x.dtype != dtype and x.numel():
        size = torch.stack(x.detach().aminmax()).abs().amax().item()
        if size >= FLOAT16_END:
            raise UserError(
                f"cache.dtype=float16: {name} that take the place of others reach {size:.6g}, and float16 ends at "
                "65504; cache.dtype=bfloat16 holds them in as many bytes"
            )
    return x.to(dtype)


def gathered(x: Tensor, slots: Tensor) -> Tensor:
    """The slots [B, H, n] of x [B, H or 1, S, ...] in new memory."""
    if x.dim() == 3:
        return x.expand(-1, slots.shape[1], -1).gather(2, slots)
    return x.gather(2, slots.view(*slots.shape, *(1,) * (x.dim() - 3)).expand(*slots.shape, *x.shape[3:]))
