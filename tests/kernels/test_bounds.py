"""The bound is wide enough for every order of summation, and narrow enough for an error of a thousandth in any op."""

from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import Rules, attention_probs, ema_weights
from kernels.bench import agreement
from kernels.quantize import dequantize, quantize
from tests.bounds import bound
from tests.kernels.both_forms import using
from tests.kernels.formula import allowed
from tests.kernels.test_mass import dense
from tests.kernels.test_quantize import codes_of

CPU = torch.device("cpu")
PLANTED = 1 / 1000
# what draws or selects is compared bit by bit
EXACT = {"noise", "select"}


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.cumsum(x.numpy(), axis=0, dtype=np.float32)[-1])  # torch's own sums in float64


def halves(x: torch.Tensor) -> torch.Tensor:
    while len(x) > 1:
        x = torch.cat((x[: len(x) // 2] + x[len(x) // 2 : len(x) // 2 * 2], x[len(x) // 2 * 2 :]))
    return x[0]


@pytest.mark.parametrize("signs", ["one sign", "random signs"])
@pytest.mark.parametrize("n", [2, 100, 3000])
def test_sums_in_any_order_stay_within_it(n, signs):
    g = torch.Generator().manual_seed(n)
    x = torch.rand(n, 500, generator=g) if signs == "one sign" else torch.randn(n, 500, generator=g)
    size = x.double().abs().sum(0)
    for order in (x, x.flip(0), x.sort(0).values):
        for add in (one_by_one, halves):
            off = ((add(order).double() - x.double().sum(0)).abs() / size).max().item()
            assert off < bound(torch.float32, n)


def test_a_sum_of_one_sign_comes_near_it():
    x = torch.rand(3000, 500, generator=torch.Generator().manual_seed(0))
    off = ((one_by_one(x).double() - x.double().sum(0)).abs() / x.double().sum(0)).max().item()
    assert off > bound(torch.float32, 3000) / 20


def test_a_logit_of_fifty_thousand_has_no_digit_behind_the_point():
    # the weights of two summations of it, one unit of the last place apart
    logit = torch.tensor(5e4)
    apart = (torch.nextafter(logit, torch.tensor(torch.inf)) - logit).exp().item() - 1
    assert apart > PLANTED
    assert apart < bound(torch.float32, 63, 5e4, width=32)
    assert apart > 10 * bound(torch.float32, 63, 5.0, width=32)


def results(form: str):
    """(op, what it gives, what the formula gives, what the bound allows), of all ops, in float32."""
    g = torch.Generator().manual_seed(0)
    with using(form):
        scores = torch.float32
        yield from agreement.results(CPU, torch.float32, scores, g)
        q, k = torch.randn(1, 4, 5, 32, generator=g), torch.randn(1, 2, 40, 32, generator=g)
        at = {"q_pos": torch.arange(35, 40)[None], "k_pos": torch.arange(40)[None, None]}
        rules = Rules(32**-0.5)
        p = attention_probs(q, k, rules, **at).flatten(1, 2)
        yield "attention_probs", p, dense(q, k, rules, **at), allowed(q, k, rules, **at)
        weights = ema_weights(40, 0.9)[0]
        yield "ema_weights", weights, 0.1 * 0.9 ** torch.arange(39, -1, -1).double(), bound(torch.float32, 1)
        x = torch.randn(1, 2, 32, 32, generator=g) + 5
        packed = quantize(x, 4, 16, 2)
        scale, offset = (y.double().repeat_interleave(16, 2) for y in (packed.scale, packed.offset))
        size = (15 * scale + offset.abs()).max().item()
        yield "dequantize", dequantize(packed), codes_of(packed) * scale + offset, bound(torch.float32, 2, size=size)
        low, high = x.unflatten(2, (2, 16)).aminmax(dim=3)
        # what is stored is the nearest number of float16, half a unit of its last place away at most
        half = torch.finfo(torch.float16).eps / 2
        yield "quantize, scale", packed.scale, (high - low).double() / 15, half * ((high - low) / 15).max().item()
        yield "quantize, offset", packed.offset, low.double(), half * low.abs().max().item()


@pytest.mark.parametrize("form", ["reference", "auto", "triton"])
def test_an_error_of_a_thousandth_in_any_op_is_caught(form):
    if form == "triton":
        pytest.importorskip("triton")
    found = set()
    for op, out, expected, off in results(form):
        found.add(op.partition(",")[0])
        assert (out.double() - expected).abs().max() <= off, op
        if op.startswith("quantize,") and op.endswith("bits"):
            continue  # half a step of a code is more than a thousandth; scale, offset and dequantize are asked alone
        assert (out.double() * (1 + PLANTED) - expected).abs().max() > off, op
    root = Path(kernels.__file__).parent
    ops = {path.parent.name for path in root.glob("*/reference.py")} - EXACT
    ops |= {name for name in kernels.__all__ if name in ("attend_pages", "attend_with_mass", "noisy_mass")}
    assert ops <= found, ops - found
