"""`quantize` and `dequantize` in Triton against their definition: the same codes, scales and offsets, bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels.quantize import BITS, Packed, dequantize, quantize
from tests.bounds import bound, near
from tests.kernels.both_forms import DTYPES, generator, on_each_device, poison, using

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["generator", "poison"]


def random(g: torch.Generator, n: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 2, n, D], with an offset that differs from channel to channel."""
    return (torch.randn(2, 2, n, D, generator=g) * 3 + torch.randn(D, generator=g) * 5).to(dtype)


def same(x: Tensor, bits: int, group: int, dim: int, zero: str = "float") -> Packed:
    """Quantize in both forms; the packed codes, on the tensor's device."""
    with using("triton"):
        ours = quantize(x, bits, group, dim, zero)
    with using("reference"):
        theirs = quantize(x.cpu(), bits, group, dim, zero)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)
    assert (ours.bits, ours.group, ours.dim) == (bits, group, dim)
    return ours


def same_back(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize in both forms. code * scale is rounded before the offset is added, or not, as the device likes."""
    with using("triton"):
        ours = dequantize(packed, dtype)
    with using("reference"):
        theirs = dequantize(packed, dtype)
    assert ours.dtype == dtype
    size = packed.offset.float().abs().max().item() + 2**packed.bits * packed.scale.float().max().item()
    near(ours, theirs, bound(dtype, 2, size=size))
    return ours


@on_each_device
@pytest.mark.parametrize("zero", ["float", "int"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", BITS)
def test_codes_scales_and_offsets_are_the_definitions_own(bits, dim, zero, device, generator):
    same_back(same(random(generator, 64, 48).to(device), bits, 16, dim, zero))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
def test_any_type_gives_the_same_codes(dim, dtype, device, generator):
    same_back(same(random(generator, 32, 64, DTYPES[dtype]).to(device), 4, 32, dim), DTYPES[dtype])


@on_each_device
@pytest.mark.parametrize(
    ("n", "D"), [(1, 32), (1, 256), (63, 32), (63, 80), (63, 128), (63, 256), (1000, 32), (300, 80), (300, 256)]
)
def test_any_number_of_tokens_and_any_width(n, D, device, generator):
    same_back(same(random(generator, n, D).to(device), 2, 16, 3))


@on_each_device
@pytest.mark.parametrize(("bits", "group"), [(3, 24), (4, 2), (8, 1), (2, 96)])
def test_groups_need_not_be_powers_of_two(bits, group, device, generator):
    x = random(generator, 96, 96).to(device)
    for dim in (2, 3):
        same_back(same(x, bits, group, dim))


@on_each_device
@pytest.mark.parametrize("dim", [2, 3])
def test_views_of_larger_memory_are_read_where_they_lie(dim, device, generator):
    x = random(generator, 80, 64).to(device)
    inside = x.transpose(1, 2)[:, 8:72].transpose(1, 2)  # tokens apart by all heads, and others around
    packed = same(inside, 4, 16, dim)
    part = packed.narrow(16, 32)
    assert torch.equal(same_back(part), same_back(packed)[:, :, 16:48])


@on_each_device
@pytest.mark.parametrize("zero", ["float", "int"])
@pytest.mark.parametrize("dim", [2, 3])
def test_groups_that_are_constant_huge_or_hardly_a_range(dim, zero, device, generator):
    x = random(generator, 16, 16)
    x[0, 0] = 1.5
    x[0, 1] = 0.0
    x[1, 0] = 1e9
    x[1, 0, 3, 3] = -1e9
    x[1, 1] = 0.001
    x[1, 1, ::2, ::2] += 1e-8
    for bits in (2, 8):
        same(x.to(device), bits, 16, dim, zero)


@on_each_device
def test_halves_go_to_the_even_code(device):
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 3.0, 0.0, 0.0], device=device).view(1, 1, 1, 8)
    assert same_back(same(x, 2, 8, 3)).flatten().tolist() == [0, 0, 2, 2, 3, 3, 0, 0]


@on_each_device
@pytest.mark.parametrize("dim", [2, 3])
def test_no_tokens_are_no_codes(dim, device):
    packed = same(torch.empty(1, 2, 0, 16, device=device), 4, 16, dim)
    assert same_back(packed).shape == (1, 2, 0, 16) if packed.scale.numel() else len(packed) == 0
