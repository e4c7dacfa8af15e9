"""Noisy column sums against the dense noisy softmax in float64, its noise drawn element by element."""

import pytest
import torch
from torch import Tensor

from kernels import Rules, Stem, mass, noisy_mass, uniform
from kernels.mass import noisy
from tests.bounds import bound, half_digit, near
from tests.kernels.formula import allowed, logits
from tests.kernels.test_mass import HEADS, RULES, D, random


def stem(q: Tensor, q_pos: Tensor | None, seed: int = 5) -> Stem:
    """Noise keyed by sample, head and, where given, the query."""
    keys = [torch.arange(q.shape[0])[:, None, None], torch.arange(4)[:, None]]
    return Stem.of(seed, *keys, *([] if q_pos is None else [q_pos[:, None]]))


def dense_noisy(q, k, rules, q_pos, k_pos, tau, fresh=True, noisy=True):
    """Rows of the noisy softmax [B, Hq, T, S] in float64, noise drawn element by element."""
    x, seen = logits(q, k, rules, q_pos, k_pos)
    k_pos = k_pos.repeat_interleave(q.shape[1] // k_pos.shape[1], dim=1)
    if noisy:
        keys = [torch.arange(len(q))[:, None, None, None], torch.arange(q.shape[1])[:, None, None]]
        keys += [q_pos[:, None, :, None]] if fresh else []
        x = x - (-uniform(5, *keys, k_pos[:, :, None]).double().log()).log()
    x = (x / tau).masked_fill(~seen, -torch.inf)
    return x.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 63), (63, 300), (130, 130)])
def test_noisy_mass_is_the_column_sum_of_the_noisy_softmax(T, S, heads, rules):
    q, k = random(HEADS[heads], T, S)
    rule = Rules(D**-0.5, **RULES[rules])
    q_pos, k_pos = torch.arange(S - T, S).expand(2, -1), torch.arange(S).expand(2, 1, -1)
    per_query = 1 + torch.arange(T).expand(2, -1) / T
    for tau, dense_tau in ((1.0, 1.0), (1.7, 1.7), (per_query, per_query.double()[:, None, :, None])):
        for fresh, noise in ((True, stem(q, q_pos)), (False, stem(q, None)), (True, None)):
            expected = dense_noisy(q, k, rule, q_pos, k_pos, dense_tau, fresh, noise is not None).sum(2)
            off = allowed(q, k, rule, q_pos, k_pos, noisy=noise is not None)
            for layout in ("positions", "tail"):
                out = noisy_mass(q, k, rule, noise, q_pos=q_pos, k_pos=k_pos, tau=tau, layout=layout)
                near(out, expected, off * expected.max().item())
                near(out.sum(-1), float(T), off * T)


def test_noisy_mass_without_noise_at_temperature_one_is_mass():
    q, k = random(2, 20, 60)
    at = {"q_pos": torch.arange(40, 60).expand(2, -1), "k_pos": torch.arange(60).expand(2, 1, -1)}
    plain = mass(q, k, Rules(0.3), **at)
    near(noisy_mass(q, k, Rules(0.3), None, **at), plain, 2 * allowed(q, k, Rules(0.3), **at, size=plain))


def test_noise_reaches_no_padding_and_each_head_its_own_slots():
    q, k = random(2, 20, 60)
    q_pos, k_pos = torch.arange(40, 60).repeat(2, 1), torch.arange(60).repeat(2, 2, 1)
    q_pos[1, :7] = -1
    k_pos[1, :, :30] = -1
    k_pos[0, 1] = k_pos[0, 1].flip(-1)  # slots of one head in another order
    out = noisy_mass(q, k, Rules(0.3), stem(q, q_pos), q_pos=q_pos, k_pos=k_pos)
    expected = dense_noisy(q, k, Rules(0.3), q_pos, k_pos, 1.0).sum(2)
    off = allowed(q, k, Rules(0.3), q_pos, k_pos, 20.0, noisy=True)
    near(out, expected, off)
    assert (out[1, :, :30] == 0).all()
    near(out[1].sum(-1), 13.0, off)


@pytest.mark.parametrize("layout", ["positions", "tail"])
def test_blocks_and_chunks_of_queries_draw_the_same_noise(layout, monkeypatch):
    q, k = random(2, 50, 90)
    q_pos, k_pos = torch.arange(40, 90).expand(2, -1), torch.arange(90).expand(2, 1, -1)
    whole = noisy_mass(q, k, Rules(0.3), stem(q, q_pos), q_pos=q_pos, k_pos=k_pos, layout=layout)
    off = 2 * allowed(q, k, Rules(0.3), q_pos, k_pos, whole, noisy=True)
    monkeypatch.setattr(noisy, "BLOCK_ELEMENTS", 1)
    blocks = noisy_mass(q, k, Rules(0.3), stem(q, q_pos), q_pos=q_pos, k_pos=k_pos, layout=layout)
    near(blocks, whole, off)
    chunks = torch.zeros_like(whole)
    for a, b in ((0, 1), (1, 33), (33, 50)):
        part = q_pos[:, a:b]
        chunks[..., : 40 + b] += noisy_mass(
            q[:, :, a:b],
            k[:, :, : 40 + b],
            Rules(0.3),
            stem(q, part),
            q_pos=part,
            k_pos=k_pos[..., : 40 + b],
            layout=layout,
        )
    near(chunks, whole, off)


def test_noisy_mass_stays_finite_where_one_logit_is_huge():
    q, k = random(2, 8, 40)
    q, k[:, :, 11] = q.abs(), 1e4
    at = {"q_pos": torch.arange(32, 40).expand(2, -1), "k_pos": torch.arange(40).expand(2, 1, -1)}
    for tau in (1.0, 2.0):
        out = noisy_mass(q, k, Rules(1.0), stem(q, at["q_pos"]), **at, tau=tau)
        off = allowed(q, k, Rules(1.0), **at, size=8.0)  # of logits this large no digit is behind the point
        near(out[:, :, 11], 8.0, off)
        near(out.sum(-1), 8.0, off)


def test_a_noisy_row_worked_by_hand(monkeypatch):
    x = torch.tensor([2.0, 0.0, 1.0, 0.5, -0.5])
    zeta = torch.tensor([0.3, 1.2, -0.4, 0.1, 0.8])
    noise = Stem(torch.zeros(1, 1, 1, dtype=torch.long))
    monkeypatch.setattr(Stem, "log_uniform", lambda self, key, *work: -(-zeta).exp())
    at = {"q_pos": torch.tensor([[4]]), "k_pos": torch.arange(5)[None, None]}
    q, k = x[None, None, None], torch.eye(5)[None, None]
    for tau, row in (
        (1.0, [0.545383, 0.181542, 0.099633, 0.099633, 0.073810]),
        (2.0, [0.357186, 0.206079, 0.152667, 0.152667, 0.131402]),
    ):
        out = noisy_mass(q, k, Rules(1.0), noise, **at, tau=tau)
        # the row is worked to six digits behind the point
        near(out[0, 0], row, bound(torch.float32, 5, 2.0) + half_digit(6))
