"""Codes against groups worked by hand, and against the formula element by element."""

import pytest
import torch
from torch import Tensor

from kernels.quantize import Packed, codes_per_pack, dequantize, planes, quantize
from methods.core.meter import nbytes
from tests.bounds import bound, half_digit, near

WIDTHS = [2, 3, 4, 8]


def random(n: int, D: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[2, 3, n, D], with an offset that differs from channel to channel."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, n, D, generator=g) * 3 + torch.randn(D, generator=g) * 5).to(dtype)


def codes_of(packed: Packed) -> Tensor:
    return torch.stack(list(planes(packed)), packed.dim + 1).flatten(packed.dim, packed.dim + 1)


def group(values: list[float], bits: int, zero: str = "float") -> tuple[list[int], list[float], Packed]:
    """Codes and dequantized values of one group of channels."""
    packed = quantize(torch.tensor(values).view(1, 1, 1, -1), bits, len(values), 3, zero)
    return codes_of(packed).flatten().tolist(), dequantize(packed).flatten().tolist(), packed


def kept_in_half(packed: Packed) -> Tensor:
    """What rounding a group's scale and offset to float16 moves its numbers by, in the shape of `scale`."""
    offset, scale = packed.offset.double(), packed.scale.double()
    # half a unit of the last place each; float16 has the fewest digits by far
    return torch.finfo(torch.float16).eps / 2 * (offset.abs() + (2**packed.bits - 1) * scale)


@pytest.mark.parametrize(
    ("values", "bits", "codes", "back", "byte"),
    [
        ([0.0, 1.0, 2.0, 4.0], 2, [0, 1, 2, 3], [0, 4 / 3, 8 / 3, 4], 0 + 1 * 4 + 2 * 16 + 3 * 64),
        ([-1.0, -0.2, 0.6, 0.3], 2, [0, 2, 3, 2], [-1, 0.0667, 0.6, 0.0667], 184),
        ([-0.5, 0.1, 0.7, 2.0], 2, [0, 1, 1, 3], [-0.5, 0.3333, 0.3333, 2.0], None),
        ([-0.5, 0.1, 0.7, 2.0], 4, [0, 4, 7, 15], [-0.5, 1 / 6, 2 / 3, 2.0], None),
    ],
)
def test_groups_by_hand(values, bits, codes, back, byte):
    found, values_back, packed = group(values, bits)
    assert found == codes
    near(values_back, back, kept_in_half(packed).max().item() + half_digit(4))
    if byte is not None:
        assert packed.codes.flatten().tolist() == [byte]


@pytest.mark.parametrize(
    ("bits", "codes", "back"),
    [(2, [0, 1, 2, 3], [-0.8333, 0.0, 0.8333, 1.6667]), (4, [0, 4, 7, 15], [-0.5, 1 / 6, 2 / 3, 2.0])],
)
def test_a_grid_through_zero_by_hand(bits, codes, back):
    found, values_back, packed = group([-0.5, 0.1, 0.7, 2.0], bits, "int")
    assert found == codes
    near(values_back, back, kept_in_half(packed).max().item() + half_digit(4))


def test_halves_go_to_the_even_code():
    # scale 1, offset 0: 0.5 and 2.5 lie between two codes
    assert group([0.0, 0.5, 1.5, 2.5, 3.0, 3.0, 0.0, 0.0], 2)[0] == [0, 0, 2, 2, 3, 3, 0, 0]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", [1, *WIDTHS])
def test_every_code_survives_packing(bits, dim):
    codes = torch.randint(2**bits, (2, 3, 64, 48), generator=torch.Generator().manual_seed(bits))
    along = codes.movedim(dim, -1)
    along[..., ::8], along[..., 1::8] = 0, 2**bits - 1  # every group has both ends: its scale is 1
    packed = quantize(codes.float(), bits, 8, dim)
    assert torch.equal(codes_of(packed), codes.to(torch.uint8))
    assert torch.equal(dequantize(packed), codes.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", ["float", "int"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_is_half_a_step_and_what_float16_adds(bits, dim, zero, dtype):
    x = random(64, dtype=dtype)
    packed = quantize(x, bits, 16, dim, zero)
    assert packed.scale.dtype == packed.offset.dtype == torch.float16
    back = dequantize(packed, dtype)
    assert back.dtype == dtype and back.shape == x.shape
    step, rounded = (y.repeat_interleave(16, dim) for y in (packed.scale.float(), kept_in_half(packed)))
    # codes are picked for the scale as stored, whose last place is 2**-10 of it
    allowed = step / 2 * (1 + 2**-9) + rounded + torch.finfo(dtype).eps * x.float().abs()
    if zero == "int":  # the grid's ends may lie half a step inside the range
        allowed = allowed + step / 2
    assert ((back.float() - x.float()).abs() <= allowed).all()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_smallest_and_largest_of_a_group_come_back(bits, dim):
    x = random(32)
    packed = quantize(x, bits, 16, dim)
    back = dequantize(packed).unflatten(dim, (-1, 16))
    allowed = kept_in_half(packed) + bound(torch.float32, 2, size=x.abs().max().item())
    for ours, theirs in zip(back.aminmax(dim=dim + 1), x.unflatten(dim, (-1, 16)).aminmax(dim=dim + 1)):
        assert ((ours - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("zero", ["float", "int"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1000.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_constant_group_comes_back_as_it_was(bits, value, zero):
    packed = quantize(torch.full((1, 1, 8, 8), value), bits, 8, 3, zero)
    if zero == "float":
        assert torch.equal(dequantize(packed), torch.full((1, 1, 8, 8), value))
    else:  # the nearest multiple of the scale
        step = packed.scale.float().max().item()
        near(dequantize(packed), value, step / 2 + kept_in_half(packed).max().item())


def test_a_range_too_small_for_float16_is_a_constant():
    x = torch.full((1, 1, 1, 8), 0.001)
    x[..., 0] += 1e-8
    assert x[..., 0] != x[..., 1]
    assert torch.equal(dequantize(quantize(x, 2, 8, 3)), torch.full_like(x, 0.001).half().float())


def test_numbers_beyond_float16_are_cut_and_spoil_nothing():
    x = torch.tensor([1e9, -1e9, 1e9, 0.0]).view(1, 1, 1, 4)
    back = dequantize(quantize(x, 4, 4, 3))
    assert back.isfinite().all()


def test_a_huge_channel_leaves_the_others_groups_of_tokens_alone():
    x = random(64)
    y = x.clone()
    y[..., 7] *= 100
    a, b = (dequantize(quantize(z, 2, 32, 2)) for z in (x, y))
    others = torch.arange(48) != 7
    assert torch.equal(a[..., others], b[..., others])
    assert not torch.equal(a[..., 7], b[..., 7])
    # in groups of channels it does harm: its neighbours lose their scale
    c, d = (dequantize(quantize(z, 2, 16, 3)) for z in (x, y))
    assert (c - x)[..., :7].abs().max() < 0.5 * (d - y)[..., :7].abs().max()


def test_a_huge_token_leaves_the_others_groups_of_channels_alone():
    x = random(64)
    y = x.clone()
    y[:, :, 5] *= 100
    a, b = (dequantize(quantize(z, 2, 16, 3)) for z in (x, y))
    others = torch.arange(64) != 5
    assert torch.equal(a[:, :, others], b[:, :, others])


@pytest.mark.parametrize(("bits", "dim"), [(bits, dim) for bits in WIDTHS for dim in (2, 3)])
def test_bytes_are_codes_and_four_per_group(bits, dim):
    n, D = 64, 48
    packed = quantize(random(n, D), bits, 16, dim)
    assert nbytes(packed.tensors()) == 2 * 3 * (n * D * bits // 8 + n * D // 16 * 4)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_of_tokens_change_nothing(bits, dim, monkeypatch):
    x = random(96)
    whole = quantize(x, bits, 16, dim)
    back = dequantize(whole)
    monkeypatch.setattr("kernels.quantize.reference.BLOCK", 40)  # no multiple of the group
    for a, b in zip(quantize(x, bits, 16, dim).tensors(), whole.tensors()):
        assert torch.equal(a, b)
    assert torch.equal(dequantize(whole), back)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_run_of_tokens_is_a_view(bits, dim):
    packed = quantize(random(96), bits, 16, dim)
    part = packed.narrow(32, 48)
    assert len(packed) == 96 and len(part) == 48
    assert torch.equal(dequantize(part), dequantize(packed)[:, :, 32:80])
    assert part.codes.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()


def test_no_tokens_are_no_codes():
    packed = quantize(torch.empty(1, 2, 0, 16), 4, 16, 3)
    assert len(packed) == 0 and dequantize(packed).shape == (1, 2, 0, 16)


def test_packs_are_the_shortest_runs_of_whole_bytes():
    assert [codes_per_pack(bits) for bits in (1, 2, 3, 4, 8)] == [8, 4, 8, 2, 1]
    # eight codes of three bits, the first in the lowest bits: 0 1 2 3 4 5 6 7 is the number 0o76543210
    packed = quantize(torch.arange(8.0).view(1, 1, 1, 8), 3, 8, 3)
    assert packed.codes.flatten().tolist() == list((0o76543210).to_bytes(3, "little"))
