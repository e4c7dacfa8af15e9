"""`attend` and its plans against the formula, row by row in float64."""

import math

import pytest
import torch
from torch import Tensor

from kernels import Rules, attend, visible
from kernels.attend import reference
from tests.bounds import bound, near
from tests.kernels.both_forms import paged
from tests.kernels.formula import allowed, formula
from tests.kernels.test_mass import dense

SHAPES = {"gqa": (4, 2), "mha": (4, 4), "mqa": (4, 1)}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": SLOPES},
    "all rules": {"window": 5, "softcap": 1.5, "slopes": SLOPES},
}
D, DV = 8, 6


def random(heads: tuple[int, int], T: int, S: int, B: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    Hq, H = heads
    shapes = ((B, Hq, T, D), (B, H, S, D), (B, H, S, DV))
    return tuple(torch.randn(shape, generator=g) * 2 for shape in shapes)


def rules_of(name: str) -> Rules:
    return Rules(D**-0.5, **RULES[name])


def is_formula(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> None:
    near(out, formula(q, k, v, rules, q_pos, k_pos), allowed(q, k, rules, q_pos, k_pos, v))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("T", [1, 63])
def test_the_causal_plan_is_the_formula(T, heads, rules):
    q, k, v = random(SHAPES[heads], T, T)
    pos = torch.arange(T).expand(2, T)
    out = attend(q, k, v, rules_of(rules), q_pos=pos, k_pos=pos[:, None], layout="causal")
    is_formula(out, q, k, v, rules_of(rules), pos, pos[:, None])


@pytest.mark.parametrize("rules", ["plain", "softcap", "slopes"])  # under a window not all slots are seen
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("S", [1, 63, 1000])
def test_a_decoded_token_over_all_slots_is_the_formula(S, heads, rules):
    q, k, v = random(SHAPES[heads], 1, S)
    k_pos, q_pos = torch.arange(S).expand(2, 1, S), torch.full((2, 1), S - 1)
    out = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=k_pos, layout="all")
    is_formula(out, q, k, v, rules_of(rules), q_pos, k_pos)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 63), (7, 63), (3, 1000)])
def test_positions_with_padding_and_a_set_per_head_are_the_formula(T, S, heads, rules):
    q, k, v = random(SHAPES[heads], T, S)
    g = torch.Generator().manual_seed(1)
    k_pos = torch.rand(2, k.shape[1], 3 * S, generator=g).argsort(-1)[..., :S].int()  # any order, any gaps
    k_pos[torch.rand(k_pos.shape, generator=g) < 0.2] = -1
    q_pos = torch.randint(S, 3 * S, (2, T), generator=g)
    q_pos[1, 0] = -1
    out = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=k_pos, layout="positions")
    is_formula(out, q, k, v, rules_of(rules), q_pos, k_pos)
    assert (out[1, :, 0] == 0).all()


@pytest.mark.parametrize("rules", RULES)
def test_a_query_that_sees_nothing_gives_zero_and_spoils_no_other(rules):
    q, k, v = random((4, 2), 3, 5)
    k_pos = torch.tensor([[-1] * 5, [7, 8, 9, 10, 11]])[:, None]  # row 0 all padding, row 1 all in the future at first
    q_pos = torch.tensor([[0, 1, 2], [5, 6, 9]])
    out = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=k_pos)
    assert (out[0] == 0).all() and (out[1, :, :2] == 0).all()
    is_formula(out, q, k, v, rules_of(rules), q_pos, k_pos)
    assert (out[1, :, 2] != 0).any()


@pytest.mark.parametrize("rules", RULES)
def test_one_huge_logit_takes_all_and_nothing_overflows(rules):
    q, k, v = random((4, 2), 1, 63)
    q, k[:, :, 60] = q.abs(), 1e4
    pos = torch.arange(63).expand(2, 1, 63)
    q_pos = torch.full((2, 1), 62)
    out = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=pos)
    if RULES[rules].get("softcap"):
        is_formula(out, q, k, v, rules_of(rules), q_pos, pos)
    else:  # however wrong the logit, its weight is 1 and all others are 0
        assert torch.equal(out, v[:, :, None, 60].repeat_interleave(2, 1))


def test_equal_keys_give_the_mean_of_the_values():
    q, _, v = random((4, 2), 1, 1000)
    k = torch.ones(2, 2, 1000, D)
    pos = torch.arange(1000).expand(2, 1, 1000)
    for layout in ("all", "positions"):
        out = attend(q, k, v, Rules(1.0), q_pos=torch.full((2, 1), 999), k_pos=pos, layout=layout)
        mean = v.double().mean(2, keepdim=True).repeat_interleave(2, 1)
        near(out, mean, allowed(q, k, Rules(1.0), torch.full((2, 1), 999), pos, v))


def test_softmax_by_hand():
    # scores 0 and ln 3: probabilities 1/4 and 3/4
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1)
    at = {"q_pos": torch.tensor([[1]]), "k_pos": torch.tensor([[[0, 1]]])}
    off = bound(torch.float32, 2, math.log(3), size=8.0)
    near(attend(q, k, v, Rules(1.0), **at), [[[[5.0]]]], off)
    # a slope of ln 3 takes the older slot to a third of its weight: 1/3 to 3
    slopes = torch.tensor([math.log(3)])
    near(attend(q, k, v, Rules(1.0, slopes=slopes), **at), [[[[8 * 0.1 + 4 * 0.9]]]], off)
    # a window of one token sees itself only
    assert attend(q, k, v, Rules(1.0, window=1), **at).item() == 4.0


def test_visibility_by_hand():
    seen = visible(torch.tensor([[3, -1]]), torch.tensor([[[0, 2, 3, 4, -1]]]), window=2)
    assert seen.tolist() == [[[[False, True, True, False, False], [False] * 5]]]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_splitting_into_blocks_changes_nothing(rows, rules, monkeypatch):
    q, k, v = random((4, 2), 23, 40)
    q_pos, k_pos = torch.arange(17, 40).expand(2, -1), torch.arange(40).expand(2, 1, -1)
    whole = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=k_pos)
    seen_rows = []
    block = reference._block
    monkeypatch.setattr(reference, "_block", lambda q, *rest: seen_rows.append(q.shape[2]) or block(q, *rest))
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", rows * 40 * 2 * (2 if rules_of(rules).plain else 4))
    split = attend(q, k, v, rules_of(rules), q_pos=q_pos, k_pos=k_pos)
    assert max(seen_rows) == min(rows, 23) and sum(seen_rows) == 23
    near(split, whole, 2 * allowed(q, k, rules_of(rules), q_pos, k_pos, v))  # each may be off


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_the_formula_in_its_own_dtype(dtype):
    q, k, v = (x.to(dtype) for x in random((4, 2), 7, 63))
    q_pos, k_pos = torch.arange(56, 63).expand(2, -1), torch.arange(63).expand(2, 1, -1)
    for rules in map(rules_of, RULES):
        out = attend(q, k, v, rules, q_pos=q_pos, k_pos=k_pos)
        assert out.dtype == dtype
        is_formula(out, q, k, v, rules, q_pos, k_pos)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("t", [0, 1, 9])
def test_pages_and_tail_are_one_softmax(t, heads, rules):
    B, counts = 2, [9, 0, 4, 1, 16, 3, 7, 8]
    (Hq, H), S = SHAPES[heads], 16
    counts = counts[: B * H]
    q, k, v = random((Hq, H), 1, S + t)
    k_pos = torch.arange(S + t).repeat(B, H, 1)
    for r, n in enumerate(counts):
        k_pos[r // H, r % H, n:S] = -1
    # a query with a fused projection's strides: rows are not one after the other
    q = torch.cat((q, q), dim=1)[:, :Hq]
    q_pos = torch.full((B, 1), S + t)
    pages, tail = paged(k, v, k_pos, counts, S)
    out, mass = reference.attend_pages(q, pages, tail, rules_of(rules), q_pos)
    is_formula(out, q, k, v, rules_of(rules), q_pos, k_pos)
    p = dense(q, k, rules_of(rules), q_pos, k_pos)[:, :, 0]
    at = torch.cat((torch.arange(pages.most), torch.arange(S, S + t)))
    near(mass, p[..., at], allowed(q, k, rules_of(rules), q_pos, k_pos))
