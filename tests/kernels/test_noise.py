"""Keyed noise: the same keys give the same number everywhere, different keys give independent ones."""

import math

import pytest
import torch

from kernels import Stem, gumbel, uniform
from kernels.noise import reference

N = 1 << 16
EULER = 0.5772156649


def test_a_number_depends_on_its_keys_and_not_on_its_place_in_the_batch():
    samples, heads, pos = torch.tensor([7, 3, 11]), torch.arange(4), torch.arange(50)
    whole = uniform(5, samples[:, None, None], heads[:, None], pos)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = uniform(5, samples[[2, 0], None, None], heads[:, None], pos[order])
    assert whole.shape == (3, 4, 50)
    assert torch.equal(shuffled, whole[[2, 0]][:, :, order])
    assert uniform(5, torch.tensor(3), torch.tensor(2), torch.tensor(9)) == whole[1, 2, 9]


def test_int32_and_int64_keys_and_the_position_of_padding_give_the_same_numbers():
    keys = torch.tensor([-1, 0, 1, 100_000])
    assert torch.equal(uniform(0, keys), uniform(0, keys.int()))
    assert torch.equal(uniform(0, keys[:1]), uniform(0, torch.tensor([2**32 - 1])))


def test_numbers_never_change_between_versions():
    # results on disk depend on them; worked out with Python integers below
    assert uniform(3, torch.tensor(5), torch.tensor(8)).item() == _by_hand(3, 5, 8)
    assert uniform(2**40 + 1, torch.tensor(2**31)).item() == _by_hand(2**40 + 1, 2**31)


def _by_hand(seed: int, *keys: int) -> float:
    """The hash in exact integers."""
    low = 2**32
    x = (seed * 0x9E3779B9 + 0x7F4A7C15) % low
    for key in keys:
        x = (x * 0x2545F491 + key) % low
        x ^= x >> 16
        x = x * 0x7FEB352D % low
        x ^= x >> 15
        x = x * 0x846CA68B % low
        x ^= x >> 16
    return ((x >> 9) + 0.5) / 2**23


@pytest.mark.parametrize("key", ["position", "sample", "seed"])
def test_numbers_are_uniform_whichever_key_counts_up(key):
    count = torch.arange(N)
    if key == "seed":
        x = torch.cat([uniform(s, torch.arange(64)) for s in range(N // 64)])
    else:
        x = uniform(1, count, torch.tensor(3)) if key == "sample" else uniform(1, torch.tensor(3), count)
    bins = torch.bincount((x * 256).long(), minlength=256)
    chi2 = ((bins - N / 256) ** 2 / (N / 256)).sum().item()
    # 255 degrees of freedom: five standard deviations either way, too even is as wrong as too uneven
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("which", ["seed", "first key", "second key", "order of keys"])
def test_neighbouring_keys_give_independent_numbers(which):
    pos, one, two = torch.arange(N), torch.tensor(1), torch.tensor(2)
    a, b = {
        "seed": (uniform(1, one, pos), uniform(2, one, pos)),
        "first key": (uniform(1, one, pos), uniform(1, two, pos)),
        "second key": (uniform(1, one, pos), uniform(1, one, pos + 1)),
        "order of keys": (uniform(1, one, pos), uniform(1, pos, one)),
    }[which]
    correlation = torch.corrcoef(torch.stack((a, b)))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(N)


def test_the_ends_of_the_interval_are_never_reached(monkeypatch):
    for end in (0, 2**32 - 1):
        monkeypatch.setattr(reference, "_mix", lambda x, end=end: torch.full_like(x, end))
        assert 0 < uniform(0, torch.arange(3))[0] < 1
        assert gumbel(0, torch.arange(3)).isfinite().all()


def test_gumbel_noise_has_the_mean_and_deviation_of_a_gumbel():
    x = gumbel(9, torch.tensor(4), torch.arange(N)).double()
    std = math.pi / math.sqrt(6)
    assert abs(x.mean().item() - EULER) < 5 * std / math.sqrt(N)
    # the fourth moment of a Gumbel is 5.4 in units of its variance squared
    assert abs(x.std().item() - std) < 5 * std * math.sqrt((5.4 - 1) / 4 / N)


def test_adding_gumbel_noise_to_log_weights_draws_in_proportion_to_the_weights():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = gumbel(0, torch.arange(N)[:, None], torch.arange(4))
    share = torch.bincount((weights.log() + noise).argmax(-1), minlength=4) / N
    assert ((share - weights).abs() < 5 * (weights * (1 - weights) / N).sqrt()).all()


def test_a_stem_gives_the_same_numbers_to_the_last_bit():
    samples, heads, queries = torch.tensor([7, 2**31 + 5]), torch.arange(3), torch.tensor([0, 9, 2**20])
    keys = torch.tensor([-1, 0, 1, 4095, 2**31 - 1], dtype=torch.int32)
    stem = Stem.of(2**33 + 7, samples[:, None, None, None], heads[:, None, None], queries[:, None])
    whole = uniform(2**33 + 7, samples[:, None, None, None], heads[:, None, None], queries[:, None], keys)
    assert torch.equal(stem.log_uniform(keys), whole.log())
    apart = Stem.of(2**33 + 7, samples[:, None, None, None]).then(heads[:, None, None]).then(queries[:, None])
    assert torch.equal(apart.state, stem.state)
    many = torch.arange(N, dtype=torch.int32)
    assert torch.equal(Stem.of(3, torch.tensor(1)).log_uniform(many), uniform(3, torch.tensor(1), many).log())


def test_a_stem_works_in_the_buffers_it_is_given():
    out, spare = torch.full((3, 50), 7, dtype=torch.int32), torch.full((3, 50), 7, dtype=torch.int32)
    stem, keys = Stem.of(1, torch.arange(3)[:, None]), torch.arange(50, dtype=torch.int32)
    x = stem.log_uniform(keys, out, spare)
    assert x.data_ptr() == out.data_ptr()
    assert torch.equal(x, Stem.of(1, torch.arange(3)[:, None]).log_uniform(keys))
    assert (x < 0).all() and x.isfinite().all()
