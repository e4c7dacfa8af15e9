"""`attend_quantized` in Triton against the formula over what the codes stand for; poisoned outputs, fresh numbers."""

import pytest
import torch
from torch import Tensor

from kernels.attend_quantized import attend_quantized
from kernels.quantize import Packed, dequantize, quantize
from tests.bounds import bound, near
from tests.kernels.both_forms import (
    DTYPES,
    RULES,
    Inputs,
    generator,
    moved,
    on_each_device,
    pairs,
    poison,
    using,
)
from tests.kernels.formula import allowed, formula

triton = pytest.importorskip("triton")
tl, plane = triton.language, pytest.importorskip("kernels.attend_quantized.triton").plane
pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["generator", "poison"]


@triton.jit
def planes(WORDS, OUT, PACK: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr, DOT: tl.constexpr):
    """Every code of 256 packs, [PACK, 256]."""
    i = tl.arange(0, 256)
    word = tl.load(WORDS + i)
    for s in tl.static_range(PACK):
        tl.store(OUT + s * 256 + i, plane(word, s, BITS, LIFT, DOT).to(tl.float32))


class Case(Inputs):
    """Random queries, keys and values; the oldest of n slots are packed: so many keys, and so many values."""

    window = 41

    def __init__(
        self, g, heads=(4, 1), T=1, n=63, keys=32, values=51, D=32, DV=None, B=1, bits=4, dim=2, group=16,
        dtype=torch.float32,
    ):  # fmt: skip
        super().__init__(g, heads, T, n, D, B, dtype, DV or D)
        k, v, DV = self.k, self.v, DV or D
        along = next(x for x in range(min(max(group, 8), D, DV), 0, -1) if D % x == 0 and DV % x == 0 and x % 8 == 0)
        self.k = (quantize(k[:, :, :keys], bits, group if dim == 2 else along, dim) if keys else None, k[:, :, keys:])
        self.v = (quantize(v[:, :, :values], bits, along, 3) if values else None, v[:, :, values:])

    def run(self, device: str, rules: str = "plain", layout: str = "positions", splits: int | None = None) -> Tensor:
        q, q_pos, k_pos = moved(device, self.q, self.q_pos, self.k_pos)
        args = q, there(device, self.k), there(device, self.v), self.rules(rules, device)
        with using("triton"):
            if splits is None:
                return attend_quantized(*args, q_pos=q_pos, k_pos=k_pos, layout=layout)
            from kernels.attend_quantized import triton

            return triton.attend_quantized(*args, q_pos, k_pos, layout, splits=splits)

    def check(self, device: str, rules: str = "plain", layout: str = "positions", splits: int | None = None) -> None:
        out = self.run(device, rules, layout, splits)
        assert out.dtype == self.q.dtype
        k, v = whole(self.k), whole(self.v)
        expected = formula(self.q, k, v, self.rules(rules), self.q_pos, self.k_pos)
        at = self.q_pos, self.k_pos
        off = allowed(self.q, k, self.rules(rules), *at, v, scores=torch.float32)
        if self.k[0] is not None and self.k[0].group == 1:
            # a code is multiplied with 2**bits on top, which is taken off again: no larger than the keys where a scale
            # is of their range, but a group without a range has 1
            lifted = 2 ** self.k[0].bits * self.q.float().abs().sum(-1).max().item() * self.rules(rules).scale
            off += bound(torch.float32, 1, lifted, size=v.abs().max().item(), width=self.q.shape[-1])
        near(out, expected, off)


def there(device: str, pair: tuple[Packed | None, Tensor]) -> tuple[Packed | None, Tensor]:
    packed, recent = pair
    if packed is not None:
        packed = Packed(*(x.to(device) for x in packed.tensors()), packed.bits, packed.group, packed.dim)
    return packed, recent.to(device)


def whole(pair: tuple[Packed | None, Tensor]) -> Tensor:
    packed, recent = pair
    return recent if packed is None else torch.cat((dequantize(packed), recent.float()), dim=2)


@on_each_device
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_any_code_width_and_direction(bits, dim, device, generator):
    case = Case(generator, bits=bits, dim=dim)
    case.check(device, layout="all")
    case.check(device, splits=2)


@on_each_device
@pytest.mark.parametrize(("D", "dtype", "G", "dim"), pairs([32, 64, 80, 128, 256], DTYPES, [1, 4, 8], [2, 3]))
def test_any_width_of_heads_type_and_size_of_a_group_of_heads(D, dtype, G, dim, device, generator):
    Case(generator, (G, 1), D=D, dim=dim, dtype=DTYPES[dtype]).check(device, layout="all")


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_cache_in_parts(dtype, device, generator):
    case = Case(generator, (4, 1), n=1000, keys=960, values=872, D=64, group=32, dtype=DTYPES[dtype])
    case.check(device, layout="all", splits=3)


@on_each_device
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    ("n", "keys", "values"),
    [(1, 0, 1), (1, 0, 0), (16, 16, 16), (64, 64, 64), (70, 0, 70), (80, 80, 0), (200, 160, 72)],
)
def test_any_place_where_the_codes_end(n, keys, values, dim, device, generator):
    Case(generator, n=n, keys=keys, values=values, dim=dim).check(device)


@on_each_device
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("T", [1, 7])
def test_rules_of_the_model(T, rules, device, generator):
    Case(generator, (4, 2), T=T, B=2, DV=16).check(device, rules)


@on_each_device
@pytest.mark.parametrize(("bits", "group"), [(3, 24), (2, 48), (8, 1), (4, 2), (2, 144)])
def test_groups_of_tokens_that_do_not_fit_a_tile(bits, group, device, generator):
    Case(generator, (2, 1), n=150, keys=144, values=130, bits=bits, group=group).check(device)


@on_each_device
def test_groups_of_a_few_channels_are_left_to_the_definition(device, generator):
    case = Case(generator, D=128)
    k, v = (torch.randn(1, 1, 63, 128, generator=generator) for _ in range(2))
    case.k, case.v = (quantize(k, 8, 1, 3), k[:, :, 63:]), (quantize(v, 8, 1, 3), v[:, :, 63:])
    case.check(device)


@on_each_device
def test_positions_differ_from_head_to_head_and_some_are_padding(device, generator):
    case = Case(generator, (4, 2), T=2, B=2)
    order = torch.rand(2, 2, 200, generator=generator).argsort(-1)[..., :63].int()
    case.k_pos = torch.where(torch.rand(2, 2, 63, generator=generator) < 0.2, -1, order)
    case.q_pos = torch.tensor([[60, 120], [-1, 199]], dtype=torch.int32)
    case.check(device, "all rules")


@on_each_device
@pytest.mark.parametrize("splits", [1, 2])
def test_a_query_that_sees_nothing_gives_zero_and_spoils_no_other(splits, device, generator):
    case = Case(generator, T=3)
    case.q_pos = torch.tensor([[-1, 40, 62]], dtype=torch.int32)
    case.check(device, splits=splits)
    assert (case.run(device, splits=splits)[0, :, 0] == 0).all()


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
def test_huge_constant_and_equal_keys_overflow_nothing(dim, dtype, device, generator):
    case = Case(generator, dim=dim, dtype=DTYPES[dtype])
    for keys in (torch.zeros(1, 1, 63, 32), torch.full((1, 1, 63, 32), -3.0), torch.randn(1, 1, 63, 32)):
        keys[:, :, 5, 7] = 200.0 if keys.abs().sum() else 0.0  # one logit takes nearly all, or all are equal
        keys = keys.to(DTYPES[dtype])
        group = case.k[0].group
        case.k = (quantize(keys[:, :, :32], 4, group, dim), keys[:, :, 32:])
        case.check(device)


@on_each_device
def test_codes_are_read_where_they_lie_in_a_growing_buffer(device, generator):
    case = Case(generator, (4, 2), B=2)

    def roomier(x: Tensor) -> Tensor:
        buffer = torch.full((*x.shape[:2], x.shape[2] + 5, x.shape[3]), 77, dtype=x.dtype)
        if x.is_floating_point():
            buffer.fill_(float("nan"))
        buffer[:, :, : x.shape[2]] = x
        return buffer[:, :, : x.shape[2]]

    def in_buffers(pair):
        packed, recent = pair
        roomy = Packed(*(roomier(x) for x in packed.tensors()), packed.bits, packed.group, packed.dim)
        return roomy, roomier(recent)

    case.k, case.v = in_buffers(case.k), in_buffers(case.v)
    case.check(device)


@on_each_device
def test_a_turn_longer_than_a_tile_of_rows(device, generator):
    Case(generator, (4, 1), T=20, n=150, keys=96, values=130).check(device)


@on_each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bits_become_numbers(bits, dtype, device):
    # the interpreter multiplies in float32 alone: this is where it meets codes in bfloat16
    pack = 8 if bits == 3 else 8 // bits
    lift = 0 if bits == 8 and dtype == "bfloat16" else 2**bits
    words = torch.arange(256, dtype=torch.int32) * (65793 if bits == 3 else 1)  # the same byte three times
    out = torch.full((pack, 256), torch.nan)
    words_there, out_there = moved(device, words if bits == 3 else words.to(torch.uint8), out)
    planes[(1,)](words_there, out_there, pack, bits, lift, getattr(tl, dtype))
    codes = torch.stack([(words >> (bits * s)) & (2**bits - 1) for s in range(pack)])
    assert torch.equal(out_there.cpu(), lift + codes.float())


@pytest.mark.cuda
def test_a_step_can_be_captured_and_replayed(generator):
    case = Case(generator, (4, 2), n=1000, keys=960, values=872, D=64, dtype=torch.bfloat16)
    expected = case.run("cuda", layout="all", splits=3)
    q, q_pos, k_pos = moved("cuda", case.q, case.q_pos, case.k_pos)
    keys, values, rules = there("cuda", case.k), there("cuda", case.v), case.rules("plain")
    graph = torch.cuda.CUDAGraph()
    with using("triton"), torch.cuda.graph(graph):
        out = attend_quantized(q, keys, values, rules, q_pos=q_pos, k_pos=k_pos, layout="all")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
