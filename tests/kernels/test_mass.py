"""`mass` against the dense softmax in float64."""

import pytest
import torch
from torch import Tensor

from kernels import Rules, attend, attend_with_mass, attention_probs, mass
from kernels.mass import reference
from tests.bounds import near
from tests.kernels.formula import allowed, logits

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {"plain": {}, "window": {"window": 9}, "softcap": {"softcap": 1.5}, "slopes": {"slopes": SLOPES}}
HEADS = {"gqa": 2, "mha": 4, "mqa": 1}
D = 8


def dense(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Softmax probabilities [B, Hq, T, S] in float64, 0 where nothing is seen."""
    x, seen = logits(q, k, rules, q_pos, k_pos)
    weight = (x - x.amax(-1, keepdim=True)).exp() * seen
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-300)


def random(H: int, T: int, S: int, B: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(S)
    return torch.randn(B, 4, T, D, generator=g) * 2, torch.randn(B, H, S, D, generator=g) * 2


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 63), (63, 63), (63, 300), (300, 300)])
def test_mass_is_the_column_sum_of_the_softmax_under_both_plans(T, S, heads, rules):
    q, k = random(HEADS[heads], T, S)
    rule = Rules(D**-0.5, **RULES[rules])
    q_pos, k_pos = torch.arange(S - T, S).expand(2, -1), torch.arange(S).expand(2, 1, -1)
    expected = dense(q, k, rule, q_pos, k_pos).sum(2)
    for layout in ("positions", "tail"):
        out = mass(q, k, rule, q_pos=q_pos, k_pos=k_pos, layout=layout)
        assert out.dtype == torch.float32
        near(out, expected, allowed(q, k, rule, q_pos, k_pos, expected))
        near(out.sum(-1), float(T), allowed(q, k, rule, q_pos, k_pos, float(T)))  # every query gives one in all


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("n", "T", "S"), [(1, 1, 63), (5, 63, 63), (63, 63, 63), (20, 63, 300), (300, 300, 300)])
def test_output_and_mass_together_are_those_of_each_alone(n, T, S, heads, rules):
    q, k = random(HEADS[heads], T, S)
    v = torch.randn(2, HEADS[heads], S, 6, generator=torch.Generator().manual_seed(1))
    rule = Rules(D**-0.5, **RULES[rules])
    at = {"q_pos": torch.arange(S - T, S).expand(2, -1), "k_pos": torch.arange(S).expand(2, 1, -1)}
    probs = dense(q, k, rule, **at)  # [B, Hq, T, S]
    for layout in ("positions", "tail"):
        out, sums = attend_with_mass(q, k, v, rule, n, **at, layout=layout)
        off = allowed(q, k, rule, **at, size=v)
        near(out, probs @ v.double().repeat_interleave(4 // HEADS[heads], dim=1), off)
        near(out, attend(q, k, v, rule, **at), 2 * off)
        expected = probs[:, :, T - n :].sum(2)
        near(sums, expected, allowed(q, k, rule, **at, size=expected))


@pytest.mark.parametrize("rules", RULES)
def test_padding_gives_and_receives_nothing(rules):
    q, k = random(2, 20, 60)
    rule = Rules(D**-0.5, **RULES[rules])
    q_pos, k_pos = torch.arange(40, 60).repeat(2, 1), torch.arange(60).repeat(2, 2, 1)
    q_pos[1, :7] = -1
    k_pos[1, :, :30] = -1
    k_pos[0, 1, 5:50] = -1  # one head holds less than the other
    out = mass(q, k, rule, q_pos=q_pos, k_pos=k_pos)
    expected = dense(q, k, rule, q_pos, k_pos).sum(2)
    near(out, expected, allowed(q, k, rule, q_pos, k_pos, expected))
    assert (out[1, :, :30] == 0).all() and (out[0, 2:, 5:50] == 0).all()
    near(out[1].sum(-1), 13.0, allowed(q, k, rule, q_pos, k_pos, 13.0))


def test_a_query_that_sees_nothing_gives_zero():
    q, k = random(2, 3, 4)
    p = attention_probs(q, k, Rules(1.0), q_pos=torch.tensor([[0, 1, 2]] * 2), k_pos=torch.full((2, 1, 4), -1))
    assert p.shape == (2, 2, 2, 3, 4) and (p == 0).all()


def test_probabilities_of_the_group_are_in_the_order_of_query_heads():
    q, k = random(2, 5, 30)
    q_pos, k_pos = torch.arange(25, 30).expand(2, -1), torch.arange(30).expand(2, 1, -1)
    p = attention_probs(q, k, Rules(0.3), q_pos=q_pos, k_pos=k_pos)
    expected = dense(q, k, Rules(0.3), q_pos, k_pos)
    near(p.flatten(1, 2), expected, allowed(q, k, Rules(0.3), q_pos, k_pos))


@pytest.mark.parametrize("layout", ["positions", "tail"])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_splitting_into_blocks_changes_nothing(rows, layout, monkeypatch):
    q, k = random(2, 50, 90)
    at = {"q_pos": torch.arange(40, 90).expand(2, -1), "k_pos": torch.arange(90).expand(2, 1, -1)}
    monkeypatch.setattr(reference, "_block_rows", lambda _: 1000)
    whole = mass(q, k, Rules(0.3), **at, layout=layout)
    monkeypatch.setattr(reference, "_block_rows", lambda _: rows)
    near(mass(q, k, Rules(0.3), **at, layout=layout), whole, 2 * allowed(q, k, Rules(0.3), **at, size=whole))


def test_one_huge_logit_takes_all_the_mass():
    q, k = random(2, 8, 40)
    q, k[:, :, 11] = q.abs(), 1e4
    at = {"q_pos": torch.arange(32, 40).expand(2, -1), "k_pos": torch.arange(40).expand(2, 1, -1)}
    for layout in ("positions", "tail"):
        out = mass(q, k, Rules(1.0), **at, layout=layout)
        off = allowed(q, k, Rules(1.0), **at, size=8.0)  # of logits this large no digit is behind the point
        near(out[:, :, 11], 8.0, off)
        near(out.sum(-1), 8.0, off)
