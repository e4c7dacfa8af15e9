"""The calls that are timed: every op at the shapes of one layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attend import Pages, Rules, attend, attend_pages, attend_pages_with_mass
from kernels.attend_quantized import attend_quantized
from kernels.mass import Sums, attend_with_mass, attend_with_sums, mass, noisy_mass
from kernels.noise import Stem
from kernels.quantize import dequantize, quantize
from kernels.rotate import rotate
from kernels.select import compact, top

# elements per scale, and slots that stay in full precision: those of the stores
GROUP, RECENT = 32, 128


@dataclass(frozen=True)
class Shape:
    """One layer: query heads, KV heads, head width."""

    n_heads: int
    n_kv_heads: int
    width: int


SHAPES = {"llama3.1-8b": Shape(32, 8, 128), "small": Shape(8, 2, 64)}


@dataclass(frozen=True)
class Case:
    """One call. moved, flops: bytes that it must read and write, and operations.  beside: a case of the same setting
    whose time this one's is told in.  decodes: whether it is part of a decode step."""

    name: str
    call: Callable[[], object]
    moved: float
    flops: float = 0.0
    beside: str | None = None
    decodes: bool = False


class Layer:
    """Random tensors of one layer with S slots."""

    def __init__(self, shape: Shape, batch: int, S: int, T: int, dtype: torch.dtype, device: torch.device):
        B, H, D = batch, shape.n_kv_heads, shape.width
        self.k, self.v = (torch.randn(B, H, S, D, device=device).to(dtype) for _ in range(2))
        self.q = torch.randn(B, shape.n_heads, T, D, device=device).to(dtype)
        self.k_pos = torch.arange(S, dtype=torch.int32, device=device).expand(B, 1, S)
        self.q_pos = torch.arange(S - T, S, dtype=torch.int32, device=device).expand(B, T)
        self.rules = Rules(D**-0.5)
        self.at = {"q_pos": self.q_pos, "k_pos": self.k_pos}


def decoding(shape: Shape, batch: int, S: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One token over S slots, and what happens to slots between tokens."""
    one = Layer(shape, batch, S, 1, dtype, device)
    q, k, v, rules, at = one.q, one.k, one.v, one.rules, one.at
    H = shape.n_kv_heads
    ends = 2 * q.nbytes
    work = 4.0 * q.numel() * S
    plain = "attend"

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=rules.scale, enable_gqa=True)

    both = k.nbytes + v.nbytes
    yield Case(plain, lambda: attend(q, k, v, rules, **at, layout="all"), both + ends, work, decodes=True)
    yield Case("SDPA of PyTorch", sdpa, both + ends, work, plain, decodes=True)
    holes = one.k_pos.expand(batch, H, S).contiguous()
    holes[:, :, ::5] = -1
    moved = both + ends + holes.nbytes
    padded = {"q_pos": one.q_pos, "k_pos": holes}
    yield Case("attend, a fifth padding", lambda: attend(q, k, v, rules, **padded), moved, work, plain, decodes=True)
    yield Case(
        "attend_with_mass",
        lambda: attend_with_mass(q, k, v, rules, 1, **at, layout="tail"),
        both + ends + 4 * batch * shape.n_heads * S,
        work,
        plain,
        decodes=True,
    )
    yield from _a_quarter(one, shape, batch, S)
    n = S - RECENT
    for bits in (4, 2):
        keys = quantize(k[:, :, :n], bits, GROUP, 2), k[:, :, n:]
        values = quantize(v[:, :, :n], bits, GROUP, 3), v[:, :, n:]
        moved = sum(x.nbytes for x in (*keys[0].tensors(), *values[0].tensors(), keys[1], values[1])) + ends
        yield Case(
            f"attend_quantized, {bits} bits",
            partial(attend_quantized, q, keys, values, rules, **at, layout="all"),
            moved,
            work,
            plain,
            decodes=True,
        )
        packed = sum(x.nbytes for x in keys[0].tensors())
        whole = k[:, :, :n].nbytes
        yield Case(f"quantize keys, {bits} bits", partial(quantize, k[:, :, :n], bits, GROUP, 2), whole + packed)
        yield Case(f"dequantize keys, {bits} bits", partial(dequantize, keys[0], dtype), whole + packed)
    angle = torch.rand(batch, 1, S, shape.width // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    yield Case("rotate keys", lambda: rotate(k, cos, sin), 2 * k.nbytes + cos.nbytes + sin.nbytes)
    scores = torch.rand(batch, H, S, device=device)
    kept = torch.full((batch, H), S // 4, device=device)
    # the least: scores are read, and as many slot numbers as are kept are written
    yield Case(
        "top and compact to a quarter",
        lambda: compact(top(scores, kept), S // 4),
        scores.nbytes + 8 * batch * H * (S // 4),
    )


def _a_quarter(one: Layer, shape: Shape, batch: int, S: int) -> Iterator[Case]:
    """A quarter of the slots: the same number in all heads, and from a tenth of the mean to its double."""
    B, H, n = batch, shape.n_kv_heads, S // 4
    q, rules, device = one.q, one.rules, one.q.device
    k, v, at_even = one.k[:, :, :n], one.v[:, :, :n], {"q_pos": one.q_pos, "k_pos": one.k_pos[..., :n]}
    work, ends = 4.0 * q.numel() * n, 2 * q.nbytes
    even = "attend to a quarter"
    moved = k.nbytes + v.nbytes + ends
    yield Case(even, lambda: attend(q, k, v, rules, **at_even, layout="all"), moved, work, "attend", decodes=True)
    share = torch.linspace(0.1, 1.9, B * H, device=device) if B * H > 1 else torch.ones(1, device=device)
    mask = torch.arange(S, device=device) < (share * n)[:, None]  # [B * H, S]
    held = mask.sum(-1)
    kept = mask.flatten().nonzero()[:, 0]
    stored = [x.reshape(B * H * S, -1)[kept] for x in (one.k, one.v)]
    at = torch.arange(len(kept), dtype=torch.int32, device=device)
    places = Pages(stored[0], stored[1], (kept % S).int(), at, held.cumsum(0) - held, held, int(held.max()))
    tail = (one.k[:, :, :0], one.v[:, :, :0], one.k_pos[..., :0].expand(B, H, 0))
    moved = stored[0].nbytes + stored[1].nbytes + places.pos.nbytes + at.nbytes + ends
    yield Case(
        "attend_pages, a quarter on average",
        lambda: attend_pages(q, places, tail, rules, q_pos=one.q_pos),
        moved,
        work,
        even,
        decodes=True,
    )
    yield Case(
        "attend_pages_with_mass, a quarter on average",
        lambda: attend_pages_with_mass(q, places, tail, rules, q_pos=one.q_pos),
        moved + 4 * B * shape.n_heads * places.most,
        work,
        even,
        decodes=True,
    )


def reading(shape: Shape, batch: int, T: int, dtype: torch.dtype, device: torch.device) -> Iterable[Case]:
    """A prompt of T tokens."""
    one = Layer(shape, batch, T, T, dtype, device)
    q, k, v, rules, at = one.q, one.k, one.v, one.rules, one.at
    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    half = 2.0 * q.numel() * T / 2  # one product under the causal mask; sums take one per pass, and there are two
    sums = 4 * batch * shape.n_heads * T
    window = {"q_pos": one.q_pos[:, -32:], "k_pos": one.k_pos}
    keys = [torch.arange(n, device=device) for n in (batch, shape.n_heads)]
    stem = Stem.of(0, keys[0][:, None, None], keys[1][:, None], one.q_pos[:, None])
    three = [Sums(), Sums(squared=True), Sums(newest=32)]
    plain = "SDPA of PyTorch"

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=rules.scale, is_causal=True, enable_gqa=True)

    return [
        Case(plain, sdpa, moved, 2 * half),
        Case("attend", lambda: attend(q, k, v, rules, **at, layout="causal"), moved, 2 * half, plain),
        Case("mass of all queries", lambda: mass(q, k, rules, **at, layout="tail"), moved / 2 + sums, 2 * half, plain),
        Case(
            "attend_with_mass of all queries",
            lambda: attend_with_mass(q, k, v, rules, T, **at, layout="tail"),
            moved + sums,
            3 * half,
            plain,
        ),
        Case(
            "attend_with_sums of three",
            lambda: attend_with_sums(q, k, v, rules, three, **at, layout="tail"),
            moved + 3 * sums,
            3 * half,
            plain,
        ),
        Case(
            "mass of the last 32 queries",
            lambda: mass(q[:, :, -32:], k, rules, **window, layout="tail"),
            k.nbytes + sums,
            4.0 * q[:, :, -32:].numel() * T,
            plain,
        ),
        Case(
            "noisy_mass of all queries",
            lambda: noisy_mass(q, k, rules, stem, **at, layout="tail"),
            moved / 2 + sums,
            2 * half,
            plain,
        ),
    ]
