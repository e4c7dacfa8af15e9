"""Padding that stands behind tokens: a step is read with all of its padding first, and its output put back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.core.contract import Step


def padding_first(real: Tensor) -> Tensor | None:
    """An order of the columns of real [B, T] that has every row's padding before its tokens, [B, T].

    None where that is so already. Waits for the device.
    """
    behind = (real.cumsum(-1) > 0) & ~real
    return real.to(torch.int8).argsort(dim=-1, stable=True) if bool(behind.any()) else None


def columns(step: Step, order: Tensor) -> Step:
    """The step with its columns in this order, [B, T]; its positions are in it already."""
    heads = {name: _take(getattr(step, name), order, 2) for name in ("q", "k", "v")}
    given = {name: x for name in ("hidden", "cos", "sin") if (x := getattr(step, name)) is not None}
    return dataclasses.replace(step, **heads, **{name: _take(x, order, 1) for name, x in given.items()})


def put_back(out: Tensor, order: Tensor) -> Tensor:
    """Outputs [B, Hq, T, Dv] of columns in this order, where the columns were."""
    return _take(out, order.argsort(dim=-1), 2)


def _take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x [B or 1, ..., T, C] with the columns of its dimension `dim` in this order."""
    at = order.view(len(order), *(1,) * (dim - 1), -1, 1)
    whole = x.expand(len(order), *x.shape[1:])
    return whole.gather(dim, at.expand(*whole.shape[:dim], -1, whole.shape[-1]))
