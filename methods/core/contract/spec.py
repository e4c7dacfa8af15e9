"""What a method may know of the model before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import rotate
from methods.core.contract.text import Vocabulary

if TYPE_CHECKING:
    from methods.core.binding.projections import Projections


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer, for turning stored keys and for undoing the turn.

    inv_freq: radians per position of each pair, [R / 2], where R <= D channels are rotated; negative where the layer
    turns the other way, and none in a layer that leaves its keys as they are.
    interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
    scale: what a scaled RoPE (YaRN, longrope) multiplies the rotated channels by, queries' as well as keys'.
    """

    inv_freq: Tensor
    interleaved: bool = False
    scale: float = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the pairs at positions [...], each [..., R / 2], the multiplier included."""
        angle = positions[..., None].float() * self.inv_freq.to(positions.device)
        return angle.cos() * self.scale, angle.sin() * self.scale

    def embed(self, raw: Tensor, positions: Tensor) -> Tensor:
        """Keys or queries [..., D] from before RoPE as the layer has them at positions [...], with the multiplier."""
        if len(self.inv_freq) == 0:
            return raw
        return rotate(raw, *self.cos_sin(positions), self.interleaved)

    def rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        """x [..., D] turned forward by delta [...] positions; the channels beyond R, and a multiplier in it, stay."""
        if len(self.inv_freq) == 0:
            return x
        angle = delta[..., None].float() * self.inv_freq.to(x.device)  # [..., R / 2]
        return rotate(x, angle.cos(), angle.sin(), self.interleaved)


@dataclass(frozen=True)
class ModelSpec:
    """What a method may know of the model before the first step."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    #: one per layer, found by turning keys as the layer does; None where nothing turns them so at every length, or
    #: where the model's positions are not RoPE's
    ropes: Sequence[Rope | None]
    alibi: bool = False
    prepared: Any = None  # what the method's `prepare` returned for this model
    vocabulary: Vocabulary | None = None  # kinds of tokens, for methods whose `needs` names it
    weights: Callable[[], Sequence[Projections]] | None = None  # of a cache's model; see `projections`

    def projections(self, layer: int) -> Projections:
        """The weights of a layer's attention by head, dequantized. Raises UserError where they are not known."""
        assert self.weights is not None, "a cache's"
        return self.weights()[layer]


@dataclass(frozen=True)
class Shape:
    """What plans know of a model before it is loaded. itemsize: bytes per number of its keys and values."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    itemsize: int
