"""The random control: uniform, keyed, and fair to every position."""

import torch

from methods import load_method
from tests.methods.conftest import kept, run
from tests.methods.layer import step_of


def test_every_position_is_kept_equally_often():
    counts, n, heads = torch.zeros(20), 20, 50
    for seed in range(40):
        cache = load_method("random", budget=5, seed=seed).caches(type("Spec", (), {"n_layers": 1}), None)[0]
        step = step_of(n, heads, heads)
        cache.append(step)
        cache.end_step(step)
        counts += torch.bincount(cache.store.pos.flatten(), minlength=n)
    expected = 40 * heads * 5 / n
    sigma = (40 * heads * 0.25 * 0.75) ** 0.5
    assert (counts - expected).abs().max() < 4 * sigma


def test_layers_heads_samples_and_seeds_draw_for_themselves(gqa):
    ids = torch.arange(60)[None]
    cache = load_method("random").cache_for(gqa, samples=[1])
    run(gqa, cache, ids)
    sets = [tuple(kept(cache, layer, 0, head)) for layer in range(2) for head in range(2)]
    for knobs, samples in (({}, [2]), ({"seed": 1}, [1])):
        other = load_method("random", **knobs).cache_for(gqa, samples=samples)
        run(gqa, other, ids)
        sets.append(tuple(kept(other)))
    assert len(set(sets)) == len(sets)
    assert all(len(s) == 30 for s in sets)


def test_a_token_survives_in_some_head_almost_always():
    # 32 heads that each keep a fifth at random: 1 - 0.8 ** 32 of the tokens are kept somewhere
    lost = total = 0
    for seed in range(30):
        cache = load_method("random", budget=0.2, seed=seed).caches(type("Spec", (), {"n_layers": 1}), None)[0]
        step = step_of(400, 32, 32, dim=2)
        cache.append(step)
        cache.end_step(step)
        total += 400
        lost += 400 - len(cache.store.pos.unique())
    expected = total * 0.8**32
    assert abs(lost - expected) < 4 * expected**0.5 + 1
