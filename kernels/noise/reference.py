"""Counter-based noise: a 32-bit hash of the keys, the same bits on every device."""

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# multipliers of the 32-bit finaliser "lowbias32", found by search (Wellons 2018, Prospecting for Hash Functions)
_M1, _M2 = 0x7FEB352D, 0x846CA68B
# multiplier between keys
_STEP = 0x2545F491


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * _M1) & _LOW
    x = x ^ (x >> 15)
    x = (x * _M2) & _LOW
    return x ^ (x >> 16)


def _start(seed: int, device: torch.device) -> Tensor:
    return torch.full((), (seed * 0x9E3779B9 + 0x7F4A7C15) & _LOW, dtype=torch.long, device=device)


def _with(state: Tensor, *keys: Tensor) -> Tensor:
    """The hash of more keys, in [0, 2**32); int64, so that products are exact in the bits that are kept."""
    for key in keys:
        state = _mix((state * _STEP + (key.long() & _LOW)) & _LOW)
    return state


def uniform(seed: int, *keys: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32, keyed by the seed and any number of integer tensors that broadcast together.

    Keys are taken modulo 2**32. The same keys give the same number on every device, in any batch and order.
    """
    # 23 bits: with 24, the half would round up to 1
    return ((_with(_start(seed, keys[0].device), *keys) >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: int, *keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, keyed as `uniform`."""
    return -torch.log(-torch.log(uniform(seed, *keys)))


@dataclass
class Stem:
    """Keys that many numbers have in common, hashed once.

    state: int64, the hash so far.
    """

    state: Tensor

    @classmethod
    def of(cls, seed: int, *keys: Tensor) -> "Stem":
        """The hash of seed and keys, as `uniform` takes them."""
        return cls(_with(_start(seed, keys[0].device), *keys))

    def then(self, key: Tensor) -> "Stem":
        """With one key more."""
        return Stem(_with(self.state, key))

    def start(self) -> Tensor:
        """What the next key is added to, as int32 of the same bits."""
        start = (self.state * _STEP) & _LOW
        return torch.where(start >= 1 << 31, start - (1 << 32), start).to(torch.int32)

    def log_uniform(self, key: Tensor, out: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
        """log of `uniform` of the stem's keys and `key`, float32, in 32-bit arithmetic; key broadcasts with the state.

        out, spare: int32 buffers of the result's shape to work in; the result lies in `out`.
        """
        shape = torch.broadcast_shapes(self.state.shape, key.shape)
        x = torch.empty(shape, dtype=torch.int32, device=key.device) if out is None else out
        y = torch.empty_like(x) if spare is None else spare
        torch.add(self.start(), key.to(torch.int32), out=x)
        for shift, factor in ((16, _M1), (15, _M2 - (1 << 32)), (16, 1)):
            torch.bitwise_right_shift(x, shift, out=y)
            x.bitwise_xor_(y.bitwise_and_(_LOW >> shift))  # the shift brought copies of the sign in
            if factor != 1:
                x.mul_(factor)
        # 23 bits under the exponent of 1 are a number in [1, 2); what `uniform` does, without rounding
        x.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1).bitwise_or_(0x3F800000)
        return x.view(torch.float32).sub_(1 - 2.0**-24).log_()
