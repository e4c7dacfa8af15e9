"""The definition of `quantize` and `dequantize`, in PyTorch: blocks of tokens, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8)
# tokens whose float32 copies exist at once
BLOCK = 4096
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Packed:
    """Codes of x [B, H, n, D] with the scale and offset of every group.

    codes: uint8, [B, H, n * bits / 8, D] when dim is 2, [B, H, n, D * bits / 8] when it is 3.
    scale, offset: float16, [B, H, n / group, D] or [B, H, n, D / group].
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group: int
    dim: int

    def __len__(self) -> int:
        """Tokens."""
        n = self.scale.shape[2]
        return n * self.group if self.dim == 2 else n

    def tensors(self) -> Iterable[Tensor]:
        """Codes, scales and offsets: all that is held."""
        return self.codes, self.scale, self.offset

    def narrow(self, start: int, n: int) -> Packed:
        """Tokens start … start + n - 1 as views; along tokens, both are whole groups."""
        if self.dim == 3:
            cut = [x.narrow(2, start, n) for x in self.tensors()]
        else:
            assert start % self.group == n % self.group == 0, "a group has one scale"
            of_group = [self.group * self.bits // 8, 1, 1]  # places of one group
            cut = [
                x.narrow(2, start // self.group * m, n // self.group * m)
                for x, m in zip(self.tensors(), of_group, strict=True)
            ]
        return replace(self, codes=cut[0], scale=cut[1], offset=cut[2])


def codes_per_pack(bits: int) -> int:
    """Codes in the smallest run of whole bytes."""
    return 8 if bits == 3 else 8 // bits


def quantize(x: Tensor, bits: int, group: int, dim: int, zero: str) -> Packed:
    """Groups in blocks of tokens."""
    assert x.shape[dim] % group == 0 and group % codes_per_pack(bits) == 0, "codes and groups fill whole bytes"
    size = BLOCK if dim == 3 else max(1, BLOCK // group) * group
    parts = [_quantize(x[:, :, i : i + size], bits, group, dim, zero) for i in range(0, max(1, x.shape[2]), size)]
    codes, scale, offset = (torch.cat(part, dim=2) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    return Packed(codes, scale, offset, bits, group, dim)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Whole groups of tokens at a time."""
    n, size = len(packed), max(1, BLOCK // packed.group) * packed.group
    blocks = [_dequantize(packed.narrow(i, min(size, n - i))).to(dtype) for i in range(0, max(1, n), size)]
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


def planes(packed: Packed) -> Iterable[Tensor]:
    """Codes j, j + m, j + 2m, … along `dim`, for j = 0 … m - 1 with m = codes_per_pack: uint8, one after the other.

    Taking them apart needs no shuffling: what is computed from a plane is shorter than the plane itself.
    """
    dim, bits = packed.dim, packed.bits
    if bits == 8:
        yield packed.codes
        return
    n_bytes = codes_per_pack(bits) * bits // 8
    x = packed.codes.unflatten(dim, (-1, n_bytes)).unbind(dim + 1)
    for j in range(codes_per_pack(bits)):
        i, shift = divmod(bits * j, 8)
        plane = x[i] >> shift if shift else x[i]
        if shift + bits > 8:
            plane = plane | (x[i + 1] << (8 - shift))
        yield plane if shift + bits == 8 else plane & (2**bits - 1)


def _quantize(x: Tensor, bits: int, group: int, dim: int, zero: str) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float().unflatten(dim, (x.shape[dim] // group, group))  # groups on dim, their elements behind it
    low, high = x.aminmax(dim=dim + 1, keepdim=True)
    span = high - low if zero == "float" else (high - low).clamp_min(1e-5)
    scale = (span / (2**bits - 1)).clamp_max(_HALF_MAX).half()
    # a constant group, also one whose range float16 cannot hold: all codes are 0 and the offset is its value
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    step = scale.float()  # codes are chosen for the scale and offset that are stored
    if zero == "float":
        offset = low.clamp(-_HALF_MAX, _HALF_MAX).half()
        codes = (x - offset.float()) / step
    else:
        first = (low / step).round()
        offset = (first * step).clamp(-_HALF_MAX, _HALF_MAX).half()
        codes = x / step - first
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(dim, dim + 1)
    return _pack(codes, bits, dim), scale.squeeze(dim + 1), offset.squeeze(dim + 1)


def _dequantize(packed: Packed) -> Tensor:
    dim, group = packed.dim, packed.group
    codes = torch.stack(list(planes(packed)), dim=dim + 1).flatten(dim, dim + 1)
    x = codes.float().unflatten(dim, (codes.shape[dim] // group, group))
    x = x * packed.scale.float().unsqueeze(dim + 1) + packed.offset.float().unsqueeze(dim + 1)
    return x.flatten(dim, dim + 1)


def _pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes [..., n, ...] as bytes [..., n * bits / 8, ...] along `dim`."""
    if bits == 8:
        return codes
    m = codes_per_pack(bits)
    run = codes.unflatten(dim, (codes.shape[dim] // m, m))
    if m * bits == 8:
        word, *rest = run.unbind(dim + 1)
        for j, code in enumerate(rest, 1):
            word = word | code << bits * j
        return word
    run = run.int()
    shift = bits * torch.arange(m, dtype=torch.int32, device=codes.device)
    word = (run << shift.view(m, *(1,) * (codes.dim() - 1 - dim))).sum(dim + 1, dtype=torch.int32)
    return torch.stack([(word >> 8 * i).to(torch.uint8) for i in range(m * bits // 8)], dim + 1).flatten(dim, dim + 1)
