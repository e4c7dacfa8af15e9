"""The definition of `attend_quantized`, in PyTorch: codes become numbers a block at a time, scales meet q and p.

With x = code * scale + offset, q·x = (q * scale)·code + q·offset. Where groups run along tokens, q is scaled once per
group; where they run along channels, each group's part of q·code is scaled once per token. Likewise p·x for values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.attend.reference import BLOCK_ELEMENTS, averages, visible
from kernels.attend.reference import products as products_with
from kernels.quantize import Packed, codes_per_pack, planes

if TYPE_CHECKING:
    from kernels.attend.rules import Layout, Rules

# elements of one block of codes; a plane of them as float32 takes 4 MiB or less (of 2**17 to 2**21, 2**20 was fastest)
UNPACKED = 1 << 20


class Products(NamedTuple):
    """What is done with codes.

    dot: q·k of q [B, H, R, D] float32 and packed keys, into a given [B, H, R, n].
    mix: p [B, H, R, n] float32 over packed values: [B, H, R, Dv].
    """

    dot: Callable[[Tensor, Packed, Tensor], None]
    mix: Callable[[Tensor, Packed], Tensor]


def attend_quantized(
    q: Tensor,
    keys: tuple[Packed | None, Tensor],
    values: tuple[Packed | None, Tensor],
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout,
    products: Products | None = None,
) -> Tensor:
    """Blocks of queries, so that a long turn needs no [T, S] matrix. products: another form of those with codes."""
    products = products or Products(dot_codes, mix_codes)
    B, Hq, T, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, k_pos.shape[-1] * B * Hq))
    out = q.new_empty(B, Hq, T, values[1].shape[-1])
    for i in range(0, T, rows):
        part = q[:, :, i : i + rows]
        p = logits(part, keys, rules, q_pos[:, i : i + rows], k_pos, layout, products).softmax(-1)  # [B, H, G * t, S]
        if layout != "all":
            p = p.nan_to_num(0.0)  # a query that sees nothing
        out[:, :, i : i + rows] = mix(p, values, products).view(*part.shape[:-1], -1)
    return out


def logits(
    q: Tensor,
    keys: tuple[Packed | None, Tensor],
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout,
    products: Products,
) -> Tensor:
    """Scores before the softmax, [B, H, G * T, S], float32; unseen slots are -inf."""
    B, _, T, D = q.shape
    packed, recent = keys
    H, S = recent.shape[1], k_pos.shape[-1]
    q = q.reshape(B, H, -1, D).float() * rules.scale  # [B, H, G * T, D]
    x = q.new_empty(*q.shape[:-1], S)
    if packed is not None:
        products.dot(q, packed, x[..., : len(packed)])
    x[..., S - recent.shape[2] :] = products_with(q, recent)
    if rules.softcap is not None:
        x = torch.tanh(x / rules.softcap) * rules.softcap
    x = x.view(B, H, -1, T, S)
    if rules.slopes is not None:
        distance = q_pos[:, None, None, :, None] - k_pos[:, :, None, None, :]  # [B, H or 1, 1, T, S]
        x = x - rules.slopes.view(1, H, -1, 1, 1) * distance
    if layout != "all":
        x = x.masked_fill(~visible(q_pos, k_pos, rules.window)[:, :, None], -torch.inf)
    return x.view(B, H, -1, S)


def mix(p: Tensor, values: tuple[Packed | None, Tensor], products: Products) -> Tensor:
    """Values weighted by p [B, H, R, S]: [B, H, R, Dv], float32."""
    packed, recent = values
    out = p.new_zeros(*p.shape[:-1], recent.shape[-1])
    if packed is not None:
        out += products.mix(p[..., : len(packed)], packed)
    return out + averages(p[..., p.shape[-1] - recent.shape[2] :], recent)


def dot_codes(q: Tensor, packed: Packed, out: Tensor) -> None:
    """q·k of keys, q [B, H, R, D], into out [B, H, R, n]."""
    dot = _dot_token_groups if packed.dim == 2 else _dot_channel_groups
    dot(q, packed, out)


def _dot_token_groups(q: Tensor, packed: Packed, out: Tensor) -> None:
    """q·k of keys grouped along tokens, q [B, H, R, D], into out [B, H, R, n]."""
    B, H, R, D = q.shape
    g, m = packed.group, codes_per_pack(packed.bits)
    for at, part in _packed_blocks(packed, H):
        U = len(part) // g
        scaled = q[:, :, None] * part.scale.float()[:, :, :, None]  # [B, H, U, R, D]
        x = q.new_empty(B, H, U, R, g // m, m)  # token m * i + j of a group lies at [i, j]
        for j, plane in enumerate(planes(part)):
            x[..., j] = scaled @ plane.float().view(B, H, U, g // m, D).transpose(-1, -2)
        bias = q @ part.offset.float().transpose(-1, -2)  # [B, H, R, U]
        x = x.view(B, H, U, R, g).transpose(2, 3) + bias[..., None]
        out[..., at : at + len(part)] = x.flatten(-2)


def _dot_channel_groups(q: Tensor, packed: Packed, out: Tensor) -> None:
    """q·k of keys grouped along channels, q [B, H, R, D], into out [B, H, R, n]."""
    B, H, R, D = q.shape
    g, m = packed.group, codes_per_pack(packed.bits)
    W = D // g
    # row (r, w) is q with all channels but those of group w at zero: one product serves all groups
    apart = q.new_zeros(B, H, R, W, W, g)
    apart.diagonal(dim1=3, dim2=4).copy_(q.view(B, H, R, W, g).transpose(-1, -2))
    apart = apart.view(B, H, R * W, D)
    sums = q.view(B, H, R, W, g).sum(-1)  # [B, H, R, W]
    for at, part in _packed_blocks(packed, H):
        x = q.new_zeros(B, H, R * W, len(part))
        for j, plane in enumerate(planes(part)):
            x += apart[..., j::m] @ plane.float().transpose(-1, -2)
        x = x.view(B, H, R, W, -1) * part.scale.float().transpose(-1, -2)[:, :, None]  # [B, H, R, W, n]
        out[..., at : at + len(part)] = x.sum(3) + sums @ part.offset.float().transpose(-1, -2)


def mix_codes(p: Tensor, packed: Packed) -> Tensor:
    """p [B, H, R, n] over values grouped along channels: [B, H, R, Dv]."""
    assert packed.dim == 3, "values are grouped along channels"
    B, H, R, _ = p.shape
    g, m = packed.group, codes_per_pack(packed.bits)
    W = packed.scale.shape[-1]
    # row (r, w) is p scaled for group w; of its product only the channels of group w are wanted
    wide = p.new_zeros(B, H, R * W, m, W * g // m)
    bias = p.new_zeros(B, H, R, W)
    for at, part in _packed_blocks(packed, H):
        weight = p[..., at : at + len(part)]
        scaled = (weight[:, :, :, None] * part.scale.float().transpose(-1, -2)[:, :, None]).flatten(2, 3)
        for j, plane in enumerate(planes(part)):
            wide[..., j, :] += scaled @ plane.float()
        bias += weight @ part.offset.float()
    of_group = wide.view(B, H, R, W, m, W, g // m).diagonal(dim1=3, dim2=5)  # [B, H, R, m, g / m, W]
    of_group = of_group.permute(0, 1, 2, 5, 4, 3).reshape(B, H, R, W, g)  # channel m * i + j of a group lies at [i, j]
    return (of_group + bias[..., None]).flatten(-2)


def _packed_blocks(packed: Packed, H: int) -> Iterator[tuple[int, Packed]]:
    """Blocks of whole groups and where their tokens start."""
    width = packed.scale.shape[0] * H * packed.scale.shape[-1] * (packed.group if packed.dim == 3 else 1)
    step = packed.group if packed.dim == 2 else 1
    size = max(1, UNPACKED // width // step) * step
    for at in range(0, len(packed), size):
        yield at, packed.narrow(at, min(size, len(packed) - at))
