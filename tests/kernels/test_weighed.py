"""Attention over slots that weigh, in every form, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import Rules, Sums, attend, attend_with_lse, attend_with_mass, attend_with_sums, mass
from tests.bounds import bound, near
from tests.kernels.both_forms import using
from tests.kernels.formula import formula, largest_logit, logits

B, S, D = 2, 37, 16
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": Rules(D**-0.5),
    "window": Rules(D**-0.5, window=9),
    "softcap": Rules(D**-0.5, softcap=1.5),
    "slopes": Rules(D**-0.5, slopes=SLOPES),
}


def case(H: int, T: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four query heads over H KV heads, some slots padding, some hidden by their bias."""
    g = torch.Generator().manual_seed(10 * H + T)
    q = torch.randn(B, 4, T, D, generator=g) * 2
    k, v = (torch.randn(B, H, S, D, generator=g).to(dtype) for _ in range(2))
    k_pos = torch.arange(S).expand(B, H, S).clone().int()
    k_pos[1, :, :6] = -1
    bias, factor = torch.randn(B, H, S, generator=g), torch.rand(B, H, S, generator=g) * 3 - 1
    bias[0, :, 20] = -torch.inf
    q_pos = torch.arange(S - T, S).expand(B, T).int()
    return {"q": q, "k": k, "v": v, "q_pos": q_pos, "k_pos": k_pos, "bias": bias, "factor": factor}


def off(c: dict[str, Tensor], rules: Rules, size: float = 1.0) -> float:
    logit = largest_logit(c["q"], c["k"], rules, c["q_pos"], c["k_pos"])
    logit += c["bias"][c["bias"].isfinite()].abs().max().item()
    return bound(torch.float32, S, logit, size=3 * c["v"].abs().max().item() * size, width=D)


def probabilities(c: dict[str, Tensor], rules: Rules) -> Tensor:
    x, seen = logits(c["q"], c["k"], rules, c["q_pos"], c["k_pos"])
    x = x + c["bias"].double().repeat_interleave(4 // c["k"].shape[1], dim=1)[:, :, None]
    return x.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("H", [1, 2, 4])
def test_a_bias_is_added_to_logits_and_a_factor_multiplies_values(H, T, rules, how):
    c, rules = case(H, T), RULES[rules]
    with using(how):
        out, lse = attend_with_lse(**c, rules=rules)
        both, summed = attend_with_mass(**c, rules=rules, n=1)
        half = Sums(squared=True, weights=torch.full((1, T), 0.5), least=2)
        _, (squares,) = attend_with_sums(**c, rules=rules, sums=[half])
        alone = mass(**{name: c[name] for name in ("q", "k", "q_pos", "k_pos", "bias")}, rules=rules)
        only_bias = attend(**{**c, "factor": None}, rules=rules)
        only_factor = attend(**{**c, "bias": None}, rules=rules)
    expected = formula(c["q"], c["k"], c["v"], rules, c["q_pos"], c["k_pos"], c["bias"], c["factor"])
    near(out, expected, off(c, rules))
    near(both, expected, off(c, rules))
    near(only_bias, formula(c["q"], c["k"], c["v"], rules, c["q_pos"], c["k_pos"], c["bias"]), off(c, rules))
    near(only_factor, formula(c["q"], c["k"], c["v"], rules, c["q_pos"], c["k_pos"], None, c["factor"]), off(c, rules))
    p = probabilities(c, rules)
    near(summed, p[:, :, -1], off(c, rules))
    near(alone, p.sum(2), off(c, rules, T))
    back = (c["q_pos"][:, :, None] - torch.arange(S))[:, None] >= 2
    near(squares, (0.5 * p.square() * back).sum(2), off(c, rules, T))
    x, seen = logits(c["q"], c["k"], rules, c["q_pos"], c["k_pos"])
    x = x + c["bias"].double().repeat_interleave(4 // H, dim=1)[:, :, None]
    near(lse, x.masked_fill(~seen, -torch.inf).logsumexp(-1), off(c, rules))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_in_16_bits_weigh_as_others_do(dtype, T):
    c, rules = case(2, T, dtype), RULES["plain"]
    out = attend(**c, rules=rules)
    near(out, formula(c["q"], c["k"], c["v"], rules, c["q_pos"], c["k_pos"], c["bias"], c["factor"]), off(c, rules))


def test_a_slot_that_stands_for_three_equal_ones_weighs_the_logarithm_of_three():
    c, rules = case(2, 1), RULES["plain"]
    k, v = (torch.cat((c[name], c[name][:, :, 9:10], c[name][:, :, 9:10]), 2) for name in ("k", "v"))
    k_pos = torch.cat((c["k_pos"], c["k_pos"][:, :, 9:10], c["k_pos"][:, :, 9:10]), 2)
    three = attend(c["q"], k, v, rules, q_pos=c["q_pos"], k_pos=k_pos)
    c["bias"] = torch.zeros(B, 2, S)
    c["bias"][:, :, 9] = math.log(3)
    near(attend(**{**c, "factor": None}, rules=rules), three, off(c, rules))


def test_a_query_that_sees_nothing_gives_nothing():
    c, rules = case(2, 2), RULES["plain"]
    c["bias"][1] = -torch.inf
    for how in ("auto", "reference"):
        with using(how):
            assert not attend(**c, rules=rules)[1].any() and not attend(**{**c, "factor": None}, rules=rules)[1].any()
            one = {**c, "q": c["q"][:, :, 1:], "q_pos": c["q_pos"][:, 1:]}
            assert not attend(**one, rules=rules)[1].any()


def test_a_bias_that_is_trained_gets_its_gradient():
    c, rules = case(2, 1), RULES["plain"]
    c["bias"] = c["bias"].nan_to_num(neginf=-5.0).requires_grad_()
    attend(**c, rules=rules).sum().backward()
    assert c["bias"].grad is not None and c["bias"].grad.abs().sum() > 0
