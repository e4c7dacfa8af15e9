"""Comparing computed numbers: every numeric test asks `bound` how far apart they may be, `near` whether they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.bounds import bound

__all__ = ["bound", "half_digit", "near"]


def near(actual: Any, expected: Any, off: float) -> None:
    """Fails unless numbers, tensors or lists of them differ by at most `off`; infinite ones are equal, NaN never is.

    A single expected number stands for all.
    """
    a, b = (
        x.detach().cpu().double() if isinstance(x, Tensor) else torch.tensor(x).double() for x in (actual, expected)
    )
    assert b.dim() == 0 or a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    apart = torch.where(a == b, 0.0, (a - b).abs())  # of two infinite ones the difference is NaN
    if not (apart <= off).all():
        worst = apart.nan_to_num(torch.inf).flatten().argmax().item()
        values = a.flatten()[worst].item(), b.expand(a.shape).flatten()[worst].item()
        share = (~(apart <= off)).double().mean().item()
        raise AssertionError(f"{values[0]} is not {values[1]} within {off:.3g}; nor are others: {share:.1%} in all")


def half_digit(digits: int) -> float:
    """How far a number worked by hand to so many digits behind the point may be from the exact one."""
    return 0.5 * 10.0**-digits
