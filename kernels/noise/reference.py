"""Counter-based noise: a 32-bit hash of the keys, computed in int64, so that every device gives the same bits."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# multipliers of the 32-bit finaliser "lowbias32", found by search (Wellons 2018, Prospecting for Hash Functions)
_M1, _M2 = 0x7FEB352D, 0x846CA68B


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * _M1) & _LOW
    x = x ^ (x >> 15)
    x = (x * _M2) & _LOW
    return x ^ (x >> 16)


def uniform(seed: int, *keys: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32, keyed by the seed and any number of integer tensors that broadcast together.

    Keys are taken modulo 2**32. The same keys give the same number on every device, in any batch and order.
    """
    x = torch.full((), (seed * 0x9E3779B9 + 0x7F4A7C15) & _LOW, dtype=torch.long, device=keys[0].device)
    for key in keys:
        x = _mix((x * 0x2545F491 + (key.long() & _LOW)) & _LOW)
    return ((x >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with 24, the half would round up to 1


def gumbel(seed: int, *keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, keyed as `uniform`."""
    return -torch.log(-torch.log(uniform(seed, *keys)))
