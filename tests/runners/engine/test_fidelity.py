"""The forced half of the panel: worked numbers, and runs in groups and alone."""

import math

import pytest
import torch

from runners.engine.fidelity.places import apart


def logs(*rows) -> torch.Tensor:
    return torch.tensor(rows).log()


P = logs((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.4, 0.35, 0.25))
Q = logs((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.3, 0.45, 0.25))


def test_kl_is_of_the_full_cache_and_in_nats():
    p, q = logs((0.7, 0.2, 0.1)), logs((0.5, 0.3, 0.2))
    said = torch.tensor([0])
    (forward,), *_ = apart(p, q[None], said)[:, 0]
    (reversed_,), *_ = apart(q, p[None], said)[:, 0]
    assert float(forward) == pytest.approx(0.085123, abs=5e-7)
    assert float(forward) / math.log(2) == pytest.approx(0.122806, abs=5e-7)
    assert float(reversed_) == pytest.approx(0.092033, abs=5e-7)


def test_every_place_has_its_numbers():
    kl, differs, clear, gap = apart(P, Q[None], torch.tensor([0, 0, 0]))[:, 0]
    assert kl.tolist() == pytest.approx([0, 0.040078, 0.027113], abs=5e-7)
    assert differs.tolist() == [0, 0, 1] and clear.tolist() == [0, 0, 1]  # ln(.4 / .35) is 0.134
    assert gap.tolist() == pytest.approx([0, math.log(0.6 / 0.5), math.log(0.4 / 0.3)], abs=1e-6)


def test_a_margin_below_a_tenth_of_a_nat_is_no_clear_flip():
    _, differs, clear, _ = apart(logs((0.38, 0.36, 0.26)), logs((0.36, 0.38, 0.26))[None], torch.tensor([0]))[:, 0, 0]
    assert (float(differs), float(clear)) == (1, 0)


def test_the_lowest_id_of_a_tie_is_the_likeliest():
    tie, second = torch.zeros(1, 3), torch.tensor([[0.0, 1e-3, 0.0]])
    assert float(apart(tie, tie[None], torch.tensor([0]))[1]) == 0
    assert float(apart(tie, second[None], torch.tensor([0]))[1]) == 1


@pytest.mark.parametrize(("n", "ceiling"), [(4, 1.386294), (32_000, 10.3735), (151_936, 11.9312)])
def test_a_cache_that_knows_nothing_is_at_the_ceiling(n, ceiling):
    sure = torch.full((1, n), -100.0)
    sure[0, 1] = 100
    assert float(apart(sure, torch.zeros(1, 1, n), torch.tensor([1]))[0]) == pytest.approx(ceiling, abs=5e-5)


def test_numbers_do_not_depend_on_what_else_is_compared_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    full, others = 3 * torch.randn(2, 50, generator=g), 3 * torch.randn(5, 2, 50, generator=g)
    said = torch.tensor([3, 4])
    expected = apart(full, others, said)
    monkeypatch.setattr("runners.engine.fidelity.places.ROOM", 250)
    assert torch.equal(apart(full, others, said), expected)
    assert torch.equal(apart(full[1:], others[3:4, 1:], said[1:]), expected[:, 3:4, 1:])
    assert (apart(full, full.expand(3, -1, -1), said) == 0).all()  # the same logits are no rounding apart


def test_another_likeliest_token_needs_a_kl_above_the_flip_bound():
    g = torch.Generator().manual_seed(1)
    full = 2 * torch.randn(500, 20, generator=g)
    near = full + 0.3 * torch.randn(4, 500, 20, generator=g)
    kl, differs, _, _ = apart(full, near, full.argmax(-1))
    first, second = full.softmax(-1).topk(2).values.unbind(-1)
    bound = (first - second).double() ** 2 / 2  # [B]
    assert 100 < differs.sum() < 1900
    assert (kl >= bound - 1e-6)[differs.bool()].all()


def test_logits_that_are_not_finite_stay_a_fault():
    broken = P.clone()
    broken[1, 0] = math.nan
    kl = apart(P, broken[None], torch.tensor([0, 0, 0]))[0, 0]
    assert kl.isfinite().tolist() == [True, False, True]
