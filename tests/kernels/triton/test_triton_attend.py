"""`attend` in Triton against its definition; poisoned outputs, fresh numbers, odd sizes."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import attend, attend_pages, attend_with_lse
from tests.bounds import bound, near
from tests.kernels.both_forms import (
    DTYPES,
    RULES,
    Inputs,
    generator,
    moved,
    on_each_device,
    paged,
    pairs,
    poison,
    using,
)
from tests.kernels.formula import allowed, formula, largest_logit
from tests.kernels.test_mass import dense
from tests.turns import taking_turns

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["generator", "poison"]


class Case(Inputs):
    window = 5

    def check(self, device, rules="plain", layout="positions", splits=None):
        q, k, v, q_pos, k_pos = moved(device, self.q, self.k, self.v, self.q_pos, self.k_pos)
        with using("triton"):
            if splits is None:
                out = attend(q, k, v, self.rules(rules, device), q_pos=q_pos, k_pos=k_pos, layout=layout)
            else:
                from kernels.attend import triton

                out = triton.attend(q, k, v, self.rules(rules, device), q_pos, k_pos, layout, splits=splits)[0]
        assert out.dtype == self.q.dtype
        expected = formula(self.q, self.k, self.v, self.rules(rules), self.q_pos, self.k_pos)
        near(out, expected, self.allowed(rules))
        return out

    def allowed(self, rules: str = "plain") -> float:
        """How far outputs may be off; logits are float32, whatever the inputs' type."""
        return allowed(self.q, self.k, self.rules(rules), self.q_pos, self.k_pos, self.v, scores=torch.float32)


@on_each_device
@pytest.mark.parametrize(("D", "dtype", "G"), pairs([32, 64, 80, 128, 256], DTYPES, [1, 4, 8]))
def test_a_turn_of_any_width_type_and_group_is_the_formula(D, dtype, G, device, generator):
    Case(generator, (G, 1), T=3, S=63, D=D, dtype=DTYPES[dtype]).check(device)


@on_each_device
@pytest.mark.parametrize(
    ("S", "G", "dtype", "plan"), pairs([1, 63, 1000], [1, 4, 8], DTYPES, [("all", 3), ("positions", 1)])
)
def test_a_decoded_token_is_the_formula_however_the_slots_are_split(S, G, dtype, plan, device, generator):
    layout, splits = plan
    Case(generator, (G, 1), S=S, D=64, dtype=DTYPES[dtype]).check(device, layout=layout, splits=splits)


@on_each_device
@pytest.mark.parametrize(("T", "heads", "rules"), pairs([1, 63], [(4, 4), (4, 1)], RULES))
def test_the_causal_plan_is_the_formula(T, heads, rules, device, generator):
    Case(generator, heads, T=T, S=T, DV=16).check(device, rules, "causal")


@on_each_device
@pytest.mark.parametrize("rules", ["plain", "softcap", "slopes"])  # under a window not all slots are seen
def test_all_slots_are_the_formula(rules, device, generator):
    Case(generator, B=2).check(device, rules, "all", splits=2)


@on_each_device
@pytest.mark.parametrize(("size", "rules", "splits"), pairs([(1, 1), (1, 150), (20, 63)], RULES, [1, 2]))
def test_positions_with_padding_and_a_set_per_head_are_the_formula(size, rules, splits, device, generator):
    T, S = size
    case = Case(generator, T=T, S=S, B=2)
    k_pos = torch.rand(2, 2, 3 * S, generator=generator).argsort(-1)[..., :S].int()  # any order, any gaps
    k_pos[torch.rand(k_pos.shape, generator=generator) < 0.2] = -1
    q_pos = torch.randint(S, 3 * S, (2, T), generator=generator)
    q_pos[1, 0] = -1
    case.q_pos, case.k_pos = q_pos, k_pos
    out = case.check(device, rules, splits=splits)
    assert (out[1, :, 0] == 0).all()


@on_each_device
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rules", ["plain", "all rules"])
def test_rows_that_see_nothing_give_zero_and_spoil_no_other(rules, splits, device, generator):
    case = Case(generator, T=3, S=300, B=2)
    case.k_pos = torch.full((2, 1, 300), -1)
    case.k_pos[1, 0, :20] = torch.arange(7, 27)  # row 0 all padding, row 1 all in the future at first
    case.q_pos = torch.tensor([[0, 1, 2], [5, 6, 9]])
    out = case.check(device, rules, splits=splits)
    assert (out[0] == 0).all() and (out[1, :, :2] == 0).all() and (out[1, :, 2] != 0).any()


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["all", "positions"])
def test_one_huge_logit_takes_all_and_nothing_overflows(layout, dtype, device, generator):
    case = Case(generator, S=150, dtype=DTYPES[dtype])
    case.q, case.k[:, :, 60] = case.q.abs() + 0.1, 1e4
    out = case.check(device, layout=layout, splits=2)
    assert torch.equal(out.cpu(), case.v[:, :, 60:61].repeat_interleave(2, 1))  # the others' weights are 0


@on_each_device
def test_equal_keys_give_the_mean_of_the_values(device, generator):
    case = Case(generator, S=300)
    case.k = torch.ones_like(case.k)
    out = case.check(device, layout="all", splits=2)
    near(out, case.v.double().mean(2, keepdim=True).repeat_interleave(2, 1), case.allowed())


@on_each_device
def test_tensors_that_are_views_of_larger_ones_are_read_where_they_lie(device, generator):
    case = Case(generator, T=2, S=63, B=2)
    nan = torch.full((2, 2, 40, 32), torch.nan)
    # buffers with free places behind the slots, queries from a fused projection
    case.k, case.v = (torch.cat((x, nan), 2)[:, :, :63] for x in (case.k, case.v))
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.k_pos = torch.cat((case.k_pos, case.k_pos), -1)[..., :63].expand(2, 2, -1)
    case.check(device)
    case.check(device, layout="positions", splits=2)


@on_each_device
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rules", ["plain", "all rules"])
def test_the_log_sum_exp_is_the_reference_s(rules, splits, device, generator):
    from kernels.attend import triton

    case = Case(generator, T=3, S=150, B=2)
    case.k_pos = case.k_pos.repeat(1, 2, 1)
    case.k_pos[1, 0] = -1
    at = {"q_pos": case.q_pos, "k_pos": case.k_pos}
    with using("reference"):
        _, expected = attend_with_lse(case.q, case.k, case.v, case.rules(rules), **at)
    given = moved(device, case.q, case.k, case.v)
    at = moved(device, case.q_pos, case.k_pos)
    out, lse = triton.attend(*given, case.rules(rules, device), *at, "positions", lse=True, splits=splits)
    logit = largest_logit(case.q, case.k, case.rules(rules), case.q_pos, case.k_pos)
    off = 2 * bound(torch.float32, 150, logit, width=32)  # a relative error of the sum; each form may be off
    near(lse, expected, off)
    assert (lse[1, :2] == -torch.inf).all()
    alone = triton.attend(*given[:2], None, case.rules(rules, device), *at, "positions", lse=True, splits=splits)
    assert alone[0] is None
    near(alone[1], expected, off)
    assert not out.isnan().any()


def test_the_reference_s_log_sum_exp_is_the_formula_s(generator):
    case = Case(generator, T=7, S=40, B=2)
    case.v = torch.ones_like(case.v)
    out, lse = attend_with_lse(case.q, case.k, case.v, case.rules("plain"), q_pos=case.q_pos, k_pos=case.k_pos)
    x = (case.q.double() @ case.k.double().repeat_interleave(2, 1).mT) * 32**-0.5
    seen = case.q_pos[:, None, :, None] >= case.k_pos[:, :, None]
    near(lse, x.masked_fill(~seen, -torch.inf).logsumexp(-1), case.allowed())  # a relative error of the sum
    near(out, 1.0, case.allowed())


@on_each_device
@pytest.mark.parametrize(("tail", "rules"), taking_turns([(0, 1), (1, 3), (9, 2)], list(RULES), of=2))
def test_pages_and_tail_are_one_softmax(tail, rules, device, generator):
    t, splits = tail
    B, (Hq, H), S = 2, (4, 2), 112
    counts = [9, 0, 100, 31]
    case = Case(generator, (Hq, H), S=S + t, B=B)
    case.k_pos = torch.arange(S + t).repeat(B, H, 1)
    for r, n in enumerate(counts):
        case.k_pos[r // H, r % H, n:S] = -1
    case.q_pos = torch.full((B, 1), S + t)
    pages, tail = paged(case.k, case.v, case.k_pos, counts, S)
    expected = formula(case.q, case.k, case.v, case.rules(rules), case.q_pos, case.k_pos)
    p = dense(case.q, case.k, case.rules(rules), case.q_pos, case.k_pos)[:, :, 0]
    p = p[..., torch.cat((torch.arange(pages.most), torch.arange(S, S + t)))]
    q, tail, q_pos = moved(device, case.q, tail, case.q_pos)
    pages = replace(pages, **{name: x.to(device) for name, x in vars(pages).items() if isinstance(x, Tensor)})
    with using("triton"):
        out = attend_pages(q, pages, tail, case.rules(rules, device), q_pos=q_pos)
    near(out, expected, case.allowed(rules))
    from kernels.attend import triton

    out, mass = triton.attend_pages(q, pages, tail, case.rules(rules, device), q_pos, mass=True, splits=splits)
    near(out, expected, case.allowed(rules))
    near(mass, p, allowed(case.q, case.k, case.rules(rules), case.q_pos, case.k_pos))


def test_splits_fill_the_device_and_never_fall_below_what_is_worth_a_program(monkeypatch):
    from kernels.attend import splits

    monkeypatch.setattr(splits, "processors", lambda device: 132)
    gpu = torch.device("cuda")
    assert splits.pick_splits(gpu, 8, 32_768) == 33  # one sequence of eight KV heads
    assert splits.pick_splits(gpu, 128, 32_768) == 2
    assert splits.pick_splits(gpu, 4096, 32_768) == 1
    for programs, S in itertools.product((1, 7, 100), (0, 1, 255, 256, 1000, 131_072)):
        assert 1 <= splits.pick_splits(gpu, programs, S) <= max(1, S // splits.LEAST_SPLIT)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_of_16_bits_under_float32_queries_are_the_formula(dtype, device, generator):
    for T, layout, splits in ((1, "all", 2), (5, "positions", None), (63, "causal", None)):
        case = Case(generator, T=T)
        case.k, case.v = case.k.to(dtype), case.v.to(dtype)
        case.check(device, layout=layout, splits=splits)
