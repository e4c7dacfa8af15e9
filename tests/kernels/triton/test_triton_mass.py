"""Column sums in Triton against their definition, the noise bit by bit; poisoned outputs, fresh numbers, odd sizes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import (
    Stem,
    Sums,
    attend_with_mass,
    attend_with_sums,
    ema_weights,
    mass,
    noisy_mass,
    uniform,
    weighted_mass,
)
from kernels.launch import noting
from tests.bounds import bound, near
from tests.kernels.both_forms import DTYPES, RULES, Inputs, generator, moved, on_each_device, pairs, poison, using
from tests.kernels.formula import allowed, formula
from tests.kernels.test_mass import dense

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
drawn = pytest.importorskip("kernels.noise.triton").uniform
pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["generator", "poison"]

LAYOUTS = ("positions", "tail")


class Case(Inputs):
    def __init__(self, g, heads=(4, 2), T=20, S=63, **more):
        super().__init__(g, heads, T, S, **more)

    def allowed(self, rules: str = "plain", size: float | Tensor = 1.0, noisy: bool = False) -> float:
        """How far sums may be off; whatever the inputs' type, logits and weights are float32."""
        at = self.q_pos, self.k_pos
        return allowed(self.q, self.k, self.rules(rules), *at, size, dtype=torch.float32, noisy=noisy)

    def check(self, op, device, rules="plain", **more) -> Tensor:
        """Runs the op in both forms on the same inputs, the reference in float32; each may be off."""
        at = {"q_pos": self.q_pos, "k_pos": self.k_pos}
        with using("reference"):
            expected = op(self.q.float(), self.k.float(), self.rules(rules), **at, **more)
        at, more = ({k: moved(device, v)[0] for k, v in given.items()} for given in (at, more))
        if isinstance(more.get("stem"), Stem):
            more["stem"] = Stem(more["stem"].state.to(device))
        with using("triton"):
            out = op(*moved(device, self.q, self.k), self.rules(rules, device), **at, **more)
        assert out.dtype == torch.float32
        near(out, expected, 2 * self.allowed(rules, expected, noisy=op is noisy_mass))
        return out.cpu()

    def stem(self, fresh: bool = True) -> Stem:
        B, Hq = self.q.shape[:2]
        keys = [torch.arange(B)[:, None, None], torch.arange(Hq)[:, None]]
        return Stem.of(2**33 + 5, *keys, *([self.q_pos[:, None]] if fresh else []))


@on_each_device
@pytest.mark.parametrize(
    ("size", "heads", "rules", "layout"),
    pairs(
        [(1, 1), (1, 63), (63, 63), (40, 70)],  # 30 older ones: tiles end at 32
        [(2, 2), (2, 1)],
        RULES,
        LAYOUTS,
    ),
)
def test_mass_is_the_reference_s_under_both_plans(size, heads, rules, layout, device, generator):
    T, S = size
    case = Case(generator, heads, T, S)
    out = case.check(mass, device, rules, layout=layout)
    near(out.sum(-1), float(T), case.allowed(rules, float(T)))  # every query gives one in all


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 80, 128, 256])
def test_mass_of_any_width_and_type_is_the_dense_sum(D, dtype, device, generator):
    for G in (1, 8):
        case = Case(generator, (G, 1), T=7, S=40, D=D, dtype=DTYPES[dtype])
        out = case.check(mass, device, layout="tail")
        expected = dense(case.q.float(), case.k.float(), case.rules("plain"), case.q_pos, case.k_pos).sum(2)
        near(out, expected, case.allowed(size=expected))


@on_each_device
def test_a_thousand_slots_get_what_they_are_due(device, generator):
    case = Case(generator, (2, 1), T=63, S=1000, D=64, dtype=torch.float16)
    case.check(mass, device, layout="tail")


@on_each_device
@pytest.mark.parametrize("rules", ["plain", "all rules"])
def test_padding_gives_and_receives_nothing(rules, device, generator):
    case = Case(generator, T=20, S=63, B=2)
    case.q_pos, case.k_pos = case.q_pos.clone(), case.k_pos.repeat(1, 2, 1)
    case.q_pos[1, :7] = -1
    case.k_pos[1, :, :30] = -1
    case.k_pos[0, 1, 5:50] = -1  # one head holds less than the other
    case.k_pos[0, 0] = case.k_pos[0, 0].flip(-1)  # and has its slots in another order
    out = case.check(mass, device, rules)
    assert (out[1, :, :30] == 0).all() and (out[0, 2:, 5:50] == 0).all()
    noisy = case.check(noisy_mass, device, rules, stem=case.stem(), tau=1.7)
    assert (noisy[1, :, :30] == 0).all()


@on_each_device
def test_a_query_that_sees_nothing_gives_nothing(device, generator):
    case = Case(generator, T=3, S=40, B=2)
    case.k_pos = torch.full((2, 1, 40), -1)
    assert (case.check(mass, device) == 0).all()
    assert (case.check(noisy_mass, device, stem=case.stem()) == 0).all()
    case.k_pos[:, :, 3] = 38
    assert case.check(mass, device).sum() == 2 * 4 * 2  # the last two of three queries see it


@on_each_device
def test_one_huge_logit_takes_all_the_mass_and_equal_ones_share_it(device, generator):
    case = Case(generator, T=8, S=63)
    case.q, case.k[:, :, 11] = case.q.abs() + 0.1, 1e4
    for layout in LAYOUTS:
        out = case.check(mass, device, layout=layout)
        near(out[:, :, 11], 8.0, case.allowed(size=8.0))
    case.check(noisy_mass, device, stem=case.stem())
    case = Case(generator, T=1, S=63)
    case.k = torch.ones_like(case.k)
    near(case.check(mass, device), 1 / 63, case.allowed(size=1 / 63))


@on_each_device
@pytest.mark.parametrize("squared", [False, True])
def test_weighted_and_squared_sums_are_the_reference_s(squared, device, generator):
    case = Case(generator, (2, 1), T=20, S=63, B=2)
    for weights in (None, torch.rand(2, 20, generator=generator), ema_weights(20, 0.9)):
        case.check(weighted_mass, device, weights=weights, squared=squared)
    case.check(weighted_mass, device, weights=weights, squared=squared, layout="tail")


def test_the_reference_s_weighted_and_squared_sums_are_the_dense_ones(generator):
    case = Case(generator, T=20, S=63, B=2)
    case.q_pos = case.q_pos.clone()
    case.q_pos[1, :5] = -1
    at, weights = {"q_pos": case.q_pos, "k_pos": case.k_pos}, torch.rand(2, 20, generator=generator)
    for rules in map(case.rules, RULES):
        p = dense(case.q, case.k, rules, **at)  # [B, Hq, T, S]
        for squared in (False, True):
            power = p.square() if squared else p
            out = weighted_mass(case.q, case.k, rules, **at, weights=weights, squared=squared)
            off = allowed(case.q, case.k, rules, **at, size=power.sum(2)) * (1 + squared)  # twice off where squared
            near(out, (power * weights.double()[:, None, :, None]).sum(2), off)
            near(weighted_mass(case.q, case.k, rules, **at, squared=squared), power.sum(2), off)


def test_blocks_of_queries_change_no_weighted_sum(generator, monkeypatch):
    from kernels.mass import weighted

    case = Case(generator, T=20, S=63, B=2)
    weights = torch.rand(2, 20, generator=generator)
    at = {"q_pos": case.q_pos, "k_pos": case.k_pos, "weights": weights}
    whole = weighted_mass(case.q, case.k, case.rules("plain"), **at)
    monkeypatch.setattr(weighted, "BLOCK_ELEMENTS", 7 * 2 * 4 * 63)
    near(weighted_mass(case.q, case.k, case.rules("plain"), **at), whole, 2 * case.allowed(size=whole))


def test_ema_weights_are_what_the_recurrence_gives():
    p, decay = torch.tensor([0.3, 0.9, 0.1, 0.7]), 0.8
    s = 0.0
    for x in p.tolist():
        s = decay * s + (1 - decay) * x
    near((ema_weights(4, decay)[0] * p).sum(), s, bound(torch.float32, 4))


@on_each_device
@pytest.mark.parametrize(
    ("T", "rules", "stem", "tau", "layout"),
    pairs([1, 40], ["plain", "all rules"], ["per query", "one", None], [1.7, "per query"], LAYOUTS),
)
def test_noisy_mass_is_the_reference_s(T, rules, stem, tau, layout, device, generator):
    case = Case(generator, (2, 1), T=T, S=63, B=2)
    tau = (1 + torch.arange(T) / T).expand(2, -1) if tau == "per query" else tau
    noise = stem and case.stem(fresh=stem == "per query")
    out = case.check(noisy_mass, device, rules, stem=noise, tau=tau, layout=layout)
    near(out.sum(-1), float(T), case.allowed(rules, float(T), noisy=True))


@on_each_device
@pytest.mark.parametrize(
    ("size", "rules", "layout"),
    pairs(
        [(1, 1, 63), (0, 1, 63), (5, 20, 63), (20, 20, 20), (40, 40, 70)],
        ["plain", "all rules"],
        LAYOUTS,
    ),
)
def test_output_and_mass_together_are_those_of_each_alone(size, rules, layout, device, generator):
    n, T, S = size
    case = Case(generator, T=T, S=S, B=2)
    q, k, v, q_pos, k_pos = moved(device, case.q, case.k, case.v, case.q_pos, case.k_pos)
    p = dense(case.q, case.k, case.rules(rules), case.q_pos, case.k_pos)
    expected = formula(case.q, case.k, case.v, case.rules(rules), case.q_pos, case.k_pos)
    with using("triton"):
        out, sums = attend_with_mass(q, k, v, case.rules(rules, device), n, q_pos=q_pos, k_pos=k_pos, layout=layout)
    near(out, expected, case.allowed(rules, case.v))
    sums_expected = p[:, :, T - n :].sum(2)
    near(sums, sums_expected, case.allowed(rules, sums_expected))


@on_each_device
@pytest.mark.parametrize(
    ("size", "rules", "layout"),
    pairs([(1, 63), (40, 70)], ["plain", "all rules"], LAYOUTS),
)
def test_output_and_any_sums_are_the_reference_s(size, rules, layout, device, generator):
    T, S = size
    case = Case(generator, (2, 1), T, S, B=2)
    weights, tau = torch.rand(2, T, generator=generator), 1 + torch.rand(2, T, generator=generator)
    noise, of_slots = case.stem(), case.stem(fresh=False)
    many = [
        Sums(), Sums(newest=max(1, T // 3)), Sums(weights=weights[:1], squared=True), Sums(least=3, most=19),
        Sums(stem=noise, tau=tau), Sums(stem=of_slots, weights=weights, newest=max(1, T // 2)), Sums(tau=2.0),
    ]  # fmt: skip
    few = [Sums(newest=max(1, T // 4), squared=True), Sums(newest=max(1, T // 2), weights=weights)]
    at = {"q_pos": case.q_pos, "k_pos": case.k_pos, "layout": layout}
    for asked, has_values in ((many, True), (few, False), ([], True)):
        with using("reference"):
            expected, sums = attend_with_sums(case.q, case.k, case.v, case.rules(rules), asked, **at)
        q, k, v = moved(device, case.q, case.k, case.v if has_values else None)
        at_there = {name: moved(device, x)[0] for name, x in at.items()}
        with using("triton"):
            there = [on(one, device) for one in asked]
            out, got = attend_with_sums(q, k, v, case.rules(rules, device), there, **at_there)
        if has_values:
            near(out, expected, 2 * case.allowed(rules, case.v))
        assert (out is not None) == has_values
        for one, sum_, wanted in zip(asked, got, sums, strict=True):
            near(sum_, wanted, 2 * (1 + one.squared) * case.allowed(rules, wanted, noisy=one.stem is not None))


def on(one: Sums, device: str) -> Sums:
    """The same sum for tensors that lie on the device."""
    weights, tau = moved(device, one.weights, one.tau)
    return replace(one, weights=weights, tau=tau, stem=one.stem and Stem(one.stem.state.to(device)))


@on_each_device
def test_sums_come_from_one_product_and_the_output_s_own(device, generator):
    """One kernel for the output, one for all sums; noise needs its own log-sum-exp and nothing more."""
    case = Case(generator, T=20, S=63)
    asked = [Sums(), Sums(squared=True), Sums(newest=4), Sums(stem=case.stem()), Sums(stem=case.stem(), squared=True)]
    asked[4] = replace(asked[4], stem=asked[3].stem)
    at = {"q_pos": case.q_pos, "k_pos": case.k_pos, "layout": "tail"}
    for n, kernels in ((3, ["rectangular", "columns"]), (5, ["rectangular", "rectangular", "columns"])):
        with using("triton"), noting() as started:
            attend_with_sums(case.q, case.k, case.v, case.rules("plain"), asked[:n], **at)
        assert [variant.kernel.__name__ for variant in started] == kernels


@on_each_device
def test_a_decoded_token_that_sees_nothing_has_neither_output_nor_mass(device, generator):
    case = Case(generator, T=1, S=63, B=2)
    case.k_pos = case.k_pos.repeat(2, 1, 1)[:2].clone()
    case.k_pos[1] = -1
    q, k, v, q_pos, k_pos = moved(device, case.q, case.k, case.v, case.q_pos, case.k_pos)
    with using("triton"):
        out, sums = attend_with_mass(q, k, v, case.rules("plain", device), 1, q_pos=q_pos, k_pos=k_pos)
    assert (out[1] == 0).all() and (sums[1] == 0).all()
    near(sums[0].sum(-1), 1.0, case.allowed())


@triton.jit
def draw(START, KEYS, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(OUT + tl.program_id(0) * N + n, drawn(tl.load(START + tl.program_id(0)), tl.load(KEYS + n)))


@on_each_device
def test_noise_has_the_reference_s_bits(device):
    rows = torch.tensor([0, 1, 2**31 - 1, 2**31 + 5])
    keys = torch.cat((torch.tensor([-1, 0, 1, 2**31 - 1, -(2**31)]), torch.arange(10**6, 10**6 + 1019))).int()
    out = torch.zeros(4, 1024, device=device)
    draw[(4,)](*moved(device, Stem.of(2**33 + 7, rows).start(), keys), out, N=1024)
    assert torch.equal(out.cpu(), uniform(2**33 + 7, rows[:, None], keys))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_16_bits_under_float32_queries_give_the_sums_of_the_same_numbers(dtype, device, generator):
    for T, layout in ((1, "tail"), (20, "positions")):
        case = Case(generator, T=T)
        case.k, case.v = case.k.to(dtype), case.v.to(dtype)
        case.check(mass, device, layout=layout)
        q, k, v, q_pos, k_pos = moved(device, case.q, case.k, case.v, case.q_pos, case.k_pos)
        with using("triton"):
            out, _ = attend_with_mass(q, k, v, case.rules("plain", device), 1, q_pos=q_pos, k_pos=k_pos, layout=layout)
        near(
            out,
            formula(case.q, case.k, case.v, case.rules("plain"), case.q_pos, case.k_pos),
            case.allowed("plain", case.v),
        )
