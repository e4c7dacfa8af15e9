"""Rotary turns as products of complex numbers; Triton beside the definition."""

import math

import pytest
import torch
from torch import Tensor

from kernels.rotate import rotate
from tests.bounds import bound, near
from tests.kernels.both_forms import DTYPES, generator, moved, on_each_device, poison, using

__all__ = ["generator", "poison"]


def turned(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Every pair as one complex number, times that of the angle, in float64."""
    R = 2 * angle.shape[-1]
    head = x[..., :R].double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    head = head if interleaved else head.transpose(-1, -2)
    pairs = torch.view_as_complex(head.contiguous()) * torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    out = torch.view_as_real(pairs)
    out = (out if interleaved else out.transpose(-1, -2)).flatten(-2)
    return torch.cat((out, x[..., R:].double()), dim=-1)


def off(x: Tensor) -> float:
    """How far a turned pair may be from its product with a sine and cosine."""
    return bound(x.dtype, 2, size=2 * x.abs().max().item())


def test_a_quarter_turn_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    assert rotate(x, cos, sin).flatten().tolist() == [-3, -4, 1, 2, 5]
    assert rotate(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, -4, 3, 5]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "R"), [(64, 64), (80, 32), (6, 2)])
def test_pairs_are_complex_numbers(D, R, interleaved, generator):
    x = torch.randn(2, 3, 5, D, generator=generator)
    angle = torch.rand(2, 1, 5, R // 2, generator=generator) * 2 * math.pi
    near(rotate(x, angle.cos(), angle.sin(), interleaved), turned(x, angle, interleaved), off(x))


@pytest.mark.usefixtures("poison")
@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "R"), [(64, 64), (80, 32), (128, 96), (256, 256)])
def test_triton_turns_the_same_way(D, R, interleaved, dtype, device, generator):
    pytest.importorskip("triton")
    # heads beside each other, as a projection leaves them; angles of each head, or of each token, or of all
    x = torch.randn(2, 9, 3, D, generator=generator).to(DTYPES[dtype]).transpose(1, 2)
    for shape in ((2, 3, 9), (2, 1, 9), (1, 1, 1)):
        angle = torch.rand(*shape, R // 2, generator=generator) * 2 * math.pi
        x_there, cos, sin = moved(device, x, angle.cos(), angle.sin())
        with using("triton"):
            out = rotate(x_there, cos, sin, interleaved)
        assert out.dtype == x.dtype
        near(out, turned(x, angle.expand(2, 3, 9, -1), interleaved), off(x))
