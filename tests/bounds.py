"""Comparing computed numbers: every numeric test asks `bound` how far apart they may be, `near` whether they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.bounds import bound

__all__ = [
    "LOUDEST",
    "MILD",
    "QUIET",
    "SHARP",
    "bound",
    "edges_off",
    "half_digit",
    "losses_off",
    "near",
    "near_codes",
    "run_off",
]

#: largest |logit| inside the attention of tests/methods/conftest.py's models, and of other tests' random models;
#: tests/test_bounds.py measures both, and the two below
SHARP, MILD = 40.0, 12.0
#: largest |logit| that these models give a token, in the same order
LOUDEST, QUIET = 12.0, 8.0
#: of what `bound` allows for a softmax, an average of values needs this share where every logit errs on its own
AVERAGED = math.sqrt(16 / 27) / 2


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


def run_off(logits: Tensor | float = LOUDEST, sharp: float = SHARP, *, layers: int = 2, length: int = 128) -> float:
    """How far two runs of a random model may be apart that compute the same: logits, hidden states, keys and values.

    logits: what is compared, or its largest size.  sharp: largest |logit| inside the attention.  length: terms of the
    longest sum, tokens or channels.

    Attention is an average m = Σ p v, and its logits, each a sum of its own, err independently by e at most (`bound`):
    m moves by Σ p (v - m) d, which is at most e √Σ p² (v - m)². A value is 1 - p times as far from m as from the
    average of the others, that is from something within 2 size, and p (1 - p)² is 4/27 at most: p² (v - m)² is within
    p size² 16/27, and the p add up to 1. So e √(16/27) size, where `bound` has 2 e for weights looked at one by one.

    Every layer adds that and what its sums are off by; the other products are shorter and have no softmax. What comes
    from the layers below goes through the residual stream as it is, and through this layer's attention: so layers add
    up as they are, though independent errors would add up as squares. Both runs are off, and independently: √2 times
    one, at as many standard deviations.
    """
    size = logits.abs().max().item() if isinstance(logits, Tensor) else logits
    sums = bound(torch.float32, length, size=size)
    softmax = bound(torch.float32, length, sharp, size=size, width=16) - sums
    return math.sqrt(2) * layers * (sums + AVERAGED * softmax)


def edges_off(logits: Tensor | float, dtype: torch.dtype) -> float:
    """`run_off` of runs whose keys and values are both rounded to this type as they come in.

    What differs by r of itself before rounding lies on two sides of an edge with probability r / eps(dtype), and is
    eps(dtype) apart then: a variance of r eps(dtype), in place of r². As r is eps(float32) at least, the standard
    deviation grows by √(eps(dtype) / eps(float32)) at most.
    """
    return run_off(logits) * math.sqrt(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


def losses_off(n: int = 1, sharp: float = MILD, size: float = QUIET) -> float:
    """How far sums of n tokens' losses of two such runs may be apart.

    A loss is a logit less a log-sum-exp, which is off by no more than the logits are; tokens err independently.
    """
    return 2 * math.sqrt(n) * run_off(size, sharp)


def near_codes(
    actual: Tensor,
    expected: Tensor,
    ours: Any,
    theirs: Any,
    n: int,
    row: int = 0,
    their_row: int = 0,
    *,
    before: int = 0,
) -> None:
    """Logits [..., T, V] of two runs under a codec are as near as rounding allows, unless codes differ at its edges.

    ours, theirs: the caches, of which one row each is compared. Of them one element in a hundred may differ, or a group
    of 32: rounding edges are rare, and a scale on one moves its group. Above a layer with such a code only the prompt's
    n tokens are compared, which were read before anything was packed.

    before: of the T logits these were made before anything was packed, and are compared even then. The others are not:
    a step of a 4-bit key is up to 2/15 of its range, of a logit of SHARP that is 5, and a weight goes from half to one.
    No bound below the values themselves holds, and that one would check nothing.
    """
    flipped = False
    for layer in range(len(ours.layers)):
        held, end = [], n if flipped else math.inf
        for cache, r in ((ours, row), (theirs, their_row)):
            store = cache.layers[layer].inner.store
            counted = (store.pos[r] >= 0) & (store.pos[r] < end)  # [H, S]
            held.append([x[r][counted].double() for x in store.read()])
        for a, b in zip(*held, strict=True):
            assert a.shape == b.shape
            differ = (a - b).abs() > run_off(b)
            assert differ.sum() <= max(32, differ.numel() // 100), "these are other codes, not rounding edges"
            flipped |= bool(differ.any())
    off = run_off(expected)
    if flipped:
        actual, expected = actual[..., :before, :], expected[..., :before, :]
    near(actual, expected, off)
