"""How keys and values come into a cache that holds numbers of a given type: rounded once, before anything sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.errors import UserError

#: what `cache.dtype` may be; auto: the type that the model makes keys and values in
CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16")
#: float32 numbers below it round to a float16 that is finite
FLOAT16_END = 65520.0


def cache_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The type of this name; None for auto. Raises UserError for one that no cache holds."""
    plain = "auto" if name is None else str(name).removeprefix("torch.")
    if plain not in CACHE_DTYPES:
        raise UserError(f"cache.dtype={plain}: give {', '.join(CACHE_DTYPES)}")
    return None if plain == "auto" else getattr(torch, plain)


class Rounding:
    """Rounds what comes into one cache, and remembers how large it was where float16 might not hold it.

    How large is known on the device, so that a decode step waits for nothing: `check` asks.
    """

    def __init__(self, dtype: torch.dtype | None, n_layers: int):
        """dtype: None leaves keys and values as they come."""
        self.dtype, self.n_layers = dtype, n_layers
        self.largest: Tensor | None = None  # |keys| and |values| of every layer so far, [n_layers, 2]
        self.new: dict[int, tuple[Tensor, Tensor]] = {}  # of the pass that goes on, one token of each layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a step as the cache takes them in; queries are float32 over another type."""
        if self.dtype is None or k.dtype == self.dtype:
            return q, k, v
        if self.dtype == torch.float16:
            self._note(layer, k.detach(), v.detach())
        return q.float(), k.to(self.dtype), v.to(self.dtype)

    def end_pass(self, wait: bool) -> None:
        """The end of a forward pass; wait: whether the device may be waited for, which a CPU never needs."""
        if len(self.new) == self.n_layers:  # all in one go
            new = [torch.stack([pair[i].flatten() for pair in self.new.values()]) for i in (0, 1)]
            self._grow(slice(None), torch.stack([x.abs().amax(1) for x in new], dim=1))
        else:
            for layer, pair in self.new.items():
                self._grow(layer, torch.stack([x.abs().amax() for x in pair]))
        self.new = {}
        if self.largest is not None and (wait or self.largest.device.type == "cpu"):
            self.check()

    def check(self) -> None:
        """Raises UserError if a key or value has come that float16 does not hold."""
        if self.largest is None or not bool((self.largest >= FLOAT16_END).any()):
            return
        layer, side = divmod(int((self.largest >= FLOAT16_END).flatten().int().argmax()), 2)
        what, size = ("keys", "values")[side], self.largest[layer, side].item()
        raise UserError(
            f"cache.dtype=float16: {what} of layer {layer} reach {size:.6g}, and float16 ends at 65504; "
            "cache.dtype=bfloat16 holds them in as many bytes"
        )

    def _note(self, layer: int, k: Tensor, v: Tensor) -> None:
        if k.shape[2] == 1:
            self.new[layer] = (k, v)
        elif k.numel():  # its ends first: a copy of absolute values would be as large as the keys
            ends = [torch.stack(x.aminmax()).abs().amax() for x in (k, v)]
            self._grow(layer, torch.stack(ends))

    def _grow(self, layers: int | slice, sizes: Tensor) -> None:
        if self.largest is None:
            self.largest = sizes.new_zeros(self.n_layers, 2, dtype=torch.float32)
        self.largest[layers] = self.largest[layers].fmax(sizes.float())
