"""NACL against the case worked by hand, the paper's sizes and the statistics of its sample."""

import dataclasses
import math

import pytest
import torch

from kernels import mass
from methods import load_method
from methods.core.errors import UserError
from methods.core.store import Store
from methods.nacl import Sizes
from tests.bounds import bound, half_digit, near
from tests.methods.conftest import kept, run
from tests.methods.layer import context, filled, step_of
from tests.tiny import feed, padded_prompt

#: F of tokens 2..13 of 16
SCORES = [0.05, 0.9, 0.02, 0.4, 0.03, 0.7, 0.01, 0.2, 0.06, 0.04, 0.3, 0.02]


def choose(method, sizes: Sizes, scores: torch.Tensor, n: int = 16, heads: int = 1, **keys) -> torch.Tensor:
    """Keep-mask [heads, n] for these scores [1, heads, n] and sizes; keys: fields of the step."""
    store, step = filled(n, heads), dataclasses.replace(step_of(n, heads, heads), **keys)
    method.sizes = lambda _: sizes
    method.proxy_scores = lambda *args: scores
    return method.score(store, step, context(store, step, sizes.kept))[0] > 0


def test_hand_worked_choice(monkeypatch):
    noise = torch.zeros(1, 1, 16)
    for j, g in zip([2, 4, 6, 8, 9, 10, 11, 12, 13], [0.1, -0.3, 2.1, 0.4, -0.2, 0.0, 1.5, -0.5, 0.2]):
        noise[..., j] = g
    monkeypatch.setattr("methods.nacl.gumbel", lambda *keys: noise)
    scores = torch.tensor([0.0, 0.0, *SCORES, 0.0, 0.0])[None, None]
    keep = choose(load_method("nacl"), Sizes(2, 2, 3, 2, 1), scores)
    assert keep[0].nonzero().flatten().tolist() == [0, 1, 3, 5, 6, 7, 11, 14, 15]


def test_sampling_probabilities_are_the_softmax_of_the_scores_left():
    rest = [0.05, 0.02, 0.03, 0.01, 0.2, 0.06, 0.04, 0.3, 0.02]
    by_hand = [0.1072, 0.1040, 0.1051, 0.1030, 0.1246, 0.1083, 0.1061, 0.1377, 0.1040]
    near(torch.tensor(rest).softmax(-1), by_hand, half_digit(4) + bound(torch.float32, 9, 0.3))
    # one draw per head and seed: the first draw's frequencies are these probabilities
    heads, seeds = 64, 60
    scores = torch.tensor([0.0, 0.0, *SCORES, 0.0, 0.0]).expand(1, heads, -1)
    counts = torch.zeros(16)
    for seed in range(seeds):
        counts += choose(load_method("nacl", seed=seed), Sizes(2, 2, 3, 1, 1), scores, heads=heads).sum(0)
    drawn = counts[[2, 4, 6, 8, 9, 10, 11, 12, 13]] / (heads * seeds)
    error = torch.tensor(by_hand).mul(1 - torch.tensor(by_hand)).div(heads * seeds).sqrt()
    assert ((drawn - torch.tensor(by_hand)).abs() < 4 * error).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_sample_follows_the_scores_and_their_temperature(temperature):
    heads, seeds, n = 100, 30, 8
    scores = torch.tensor([0.0, 0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 0.0])  # what lies between the ends is drawn from
    counts = torch.zeros(n)
    for seed in range(seeds):
        method = load_method("nacl", seed=seed, temperature=temperature)
        counts += choose(method, Sizes(1, 1, 0, 1, 1), scores.expand(1, heads, -1), n, heads).sum(0)
    p = (scores[1:-1] / temperature).softmax(-1)
    error = (p * (1 - p) / (heads * seeds)).sqrt()
    assert ((counts[1:-1] / (heads * seeds) - p).abs() < 4.5 * error).all()


def test_the_sample_follows_the_sum_of_a_groups_scores():
    heads, seeds, n = 100, 30, 8
    pair = torch.tensor([[0.0, 0.0, 0.4, 1.1, 0.2, 1.5, 0.9, 0.0], [0.0, 0.3, 0.1, 0.2, 1.6, 0.4, 1.3, 0.0]])
    counts = torch.zeros(n)
    for seed in range(seeds):
        scores = pair.repeat(heads, 1)[None]  # two query heads of every KV head
        counts += choose(load_method("nacl", seed=seed), Sizes(1, 1, 0, 1, 1), scores, n, heads).sum(0)
    p = pair.double().sum(0)[1:-1].softmax(-1)
    error = (p * (1 - p) / (heads * seeds)).sqrt()
    assert ((counts[1:-1] / (heads * seeds) - p).abs() < 4.5 * error).all()


def test_every_layer_and_every_sample_draws_for_itself():
    sizes, scores = Sizes(1, 1, 0, 5, 1), torch.zeros(1, 4, 16)
    draws = [
        choose(load_method("nacl"), sizes, scores, heads=4, layer=layer, samples=torch.tensor([sample]))
        for layer, sample in ((0, 3), (1, 3), (0, 4))
    ]
    again = choose(load_method("nacl"), sizes, scores, heads=4, layer=0, samples=torch.tensor([3]))
    assert torch.equal(draws[0], again)
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_later_draw_is_another_one():
    sizes, scores, n = Sizes(1, 1, 0, 5, 1), torch.zeros(1, 4, 16), 16
    method, store, step = load_method("nacl"), filled(n, 4), step_of(n, 4, 4)
    method.sizes, method.proxy_scores = lambda _: sizes, lambda *args: scores
    first, later = (method.score(store, step, context(store, step, 7, again=again)) for again in (False, True))
    assert not torch.equal(first, later) and (first > 0).sum() == (later > 0).sum() == 28


def test_without_scores_every_token_is_drawn_equally_often():
    heads, seeds, n, draws = 100, 100, 12, 3
    counts = torch.zeros(n)
    for seed in range(seeds):
        scores = torch.zeros(1, heads, n)
        counts += choose(load_method("nacl", seed=seed), Sizes(1, 1, 0, draws, 1), scores, n, heads).sum(0)
    p = draws / (n - 2)
    sigma = math.sqrt(heads * seeds * p * (1 - p))
    assert counts[0] == counts[-1] == heads * seeds
    assert (counts[1:-1] - heads * seeds * p).abs().max() < 4 * sigma


def test_sizes_of_the_release_at_128k():
    sizes = load_method("nacl", preset="code", budget=0.2).sizes(130_048)
    assert sizes == Sizes(sinks=256, recent=1044, by_score=15_605, by_chance=9_103, proxies=1300)
    assert sizes.kept == 26_008


def test_sizes_of_the_paper_at_a_tenth():
    sizes = load_method("nacl", budget=0.1).sizes(4000)
    assert sizes == Sizes(sinks=20, recent=20, by_score=120, by_chance=240, proxies=800)


def test_an_odd_protected_slot_is_a_recent_one_and_one_query_always_scores():
    assert load_method("nacl", budget=50).sizes(200) == Sizes(sinks=2, recent=3, by_score=15, by_chance=30, proxies=40)
    assert load_method("nacl").sizes(3).proxies == 1  # a fifth of three tokens is none


def test_what_a_later_run_leaves_depends_on_what_is_held():
    method = load_method("nacl", budget=0.5, min_len=60, decode_interval=4)
    assert [method.again(50, held) for held in (50, 60, 61)] == [50, 60, 24]  # 1 + 1, 7 and 15 of 25
    method = load_method("nacl", budget=100, decode_interval=4)
    assert [method.again(50, held) for held in (54, 100, 101)] == [54, 100, 100]


def test_kept_sets_have_the_exact_size_and_the_protected_ends(gqa):
    method = load_method("nacl", budget=0.5, protect=0.2, by_score=0.3, by_chance=0.5)
    cache = method.cache_for(gqa)
    run(gqa, cache, torch.arange(90)[None] % 97)
    sizes = method.sizes(90)
    for layer in range(2):
        for head in range(2):
            positions = kept(cache, layer, 0, head)
            assert len(positions) == len(set(positions)) == sizes.kept == 44  # 9 + 13 + 22
            assert set(range(sizes.sinks)) | set(range(90 - sizes.recent, 90)) <= set(positions)


def test_seeds_change_only_the_random_part(gqa):
    ids = torch.arange(90)[None] % 97
    sets = []
    for seed in (0, 1):
        cache = load_method("nacl", budget=0.5, by_chance=0.0, by_score=0.9, seed=seed).cache_for(gqa)
        run(gqa, cache, ids)
        sets.append(kept(cache, 1))
    assert sets[0] == sets[1]
    sets = []
    for seed in (0, 1):
        cache = load_method("nacl", budget=0.5, seed=seed).cache_for(gqa)
        run(gqa, cache, ids)
        sets.append(set(kept(cache, 1)))
    assert sets[0] != sets[1] and len(sets[0]) == len(sets[1])


def test_heads_with_equal_scores_draw_differently():
    keep = choose(load_method("nacl"), Sizes(1, 1, 0, 5, 1), torch.zeros(1, 2, 16), heads=2)
    assert not torch.equal(keep[0], keep[1])


def test_all_queries_as_proxies_and_no_chance_is_the_heavy_hitter_choice(gqa):
    method = load_method("nacl", budget=0.5, protect=0.0, by_score=1.0, by_chance=0.0, proxy=1.0)
    step = step_of(40, heads=4, kv_heads=2)
    cache = method.caches(type("Spec", (), {"n_layers": 1}), None)[0]
    cache.append(step)
    cache.end_step(step)
    columns = mass(step.q, step.k, step.rules, q_pos=step.pos, k_pos=step.pos[:, None]).view(1, 2, 2, 40).sum(2)
    for head in range(2):
        expected = columns[0, head].topk(20).indices.sort().values.tolist()
        assert cache.store.pos[0, head].tolist() == expected


def test_window_proxies_without_chance_choose_as_snapkv_without_pooling(gqa):
    ids, n, window, budget = torch.arange(80)[None] % 97, 80, 8, 40
    snapkv = load_method("snapkv", budget=budget, window=window, kernel=1).cache_for(gqa)
    nacl = load_method("nacl", budget=budget / n, by_chance=0.0, proxy=window / n)
    nacl.sizes = lambda _: Sizes(0, window, budget - window, 0, window)
    ours = nacl.cache_for(gqa)
    run(gqa, snapkv, ids)
    run(gqa, ours, ids)
    assert [kept(ours, 1, 0, h) for h in range(2)] == [kept(snapkv, 1, 0, h) for h in range(2)]


def test_proxies_that_see_ahead_change_the_votes(gqa):
    ids = torch.arange(60)[None] % 97
    knobs = {"budget": 0.3, "protect": 0.0, "by_score": 1.0, "by_chance": 0.0}
    causal, ahead = (load_method("nacl", proxy_causal=flag, **knobs).cache_for(gqa) for flag in (True, False))
    run(gqa, causal, ids)
    run(gqa, ahead, ids)
    assert kept(causal, 0) != kept(ahead, 0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_short_row_has_its_own_number_of_proxies(causal, gqa):
    ids, mask = padded_prompt([60, 30])
    knobs = {"protect": 0.0, "by_score": 1.0, "by_chance": 0.0, "proxy": 0.5, "proxy_causal": causal}
    method = load_method("nacl", budget=0.3, **knobs)
    batch, alone = method.cache_for(gqa), method.cache_for(gqa)
    run(gqa, batch, ids, mask=mask)
    run(gqa, alone, ids[1:, 30:])
    assert [kept(batch, i, 1, i) for i in (0, 1)] == [kept(alone, i, 0, i) for i in (0, 1)]


def test_at_a_later_prompts_end_a_row_chooses_as_it_does_beside_a_longer_one(gqa):
    knobs = {"protect": 0.0, "by_score": 1.0, "by_chance": 0.0, "proxy": 0.3}
    ids, mask = padded_prompt([60, 50])
    ids, mask = torch.cat((ids, ids[:, -30:]), dim=1), torch.cat((mask, torch.ones(2, 30, dtype=torch.long)), dim=1)
    sets = []
    for rows, first in ((slice(None), 0), (slice(1, None), 10)):
        cache = load_method("nacl", budget=0.5, **knobs).cache_for(gqa)
        feed(gqa, cache, ids[rows, first:60], mask[rows, first:60], [60 - first])
        cache.compress_next()
        feed(gqa, cache, ids[rows, first:], mask[rows, first:], [30], start=60 - first)
        sets.append([kept(cache, layer, -1, head) for layer in (0, 1) for head in (0, 1)])
    assert sets[0] == sets[1]


def test_decode_interval_brings_the_cache_back_to_its_size(gqa):
    method = load_method("nacl", budget=0.5, decode_interval=4)
    cache = method.cache_for(gqa)
    ids, new = torch.arange(60)[None] % 97, torch.arange(9)[None]
    size = method.sizes(60).kept
    run(gqa, cache, ids, new=new[:, :3])
    assert len(kept(cache, 1)) == size + 3
    cache = method.cache_for(gqa)
    run(gqa, cache, ids, new=new[:, :4])
    assert len(kept(cache, 1)) == size
    cache = method.cache_for(gqa)
    run(gqa, cache, ids, new=new)
    assert len(kept(cache, 1)) == size + 1


def test_rows_of_a_padded_turn_count_their_own_tokens_until_they_are_cut_again(gqa):
    method = load_method("nacl", budget=0.5, decode_interval=4)
    cache, size = method.cache_for(gqa), method.sizes(60).kept
    ids, mask = torch.arange(120).view(2, 60) % 97, torch.ones(2, 66, dtype=torch.long)
    mask[1, 60:62] = 0  # a turn of three tokens and one of one
    pos = (mask.cumsum(-1) - 1).clamp_min(0)
    held = []
    with torch.no_grad():
        for a, b in ((0, 60), (60, 63), (63, 64), (64, 65), (65, 66)):
            own = {"attention_mask": mask[:, :b], "position_ids": pos[:, a:b], "past_key_values": cache}
            gqa(ids[:, :1].expand(2, b - a) if a else ids, use_cache=True, **own)
            held.append([len(kept(cache, 1, row)) - size for row in (0, 1)])
    assert held == [[0, 0], [3, 1], [0, 2], [1, 3], [2, 0]]


def test_only_the_first_cut_of_a_row_has_the_draw_of_the_first(gqa):
    method, seen = load_method("nacl", budget=0.5, decode_interval=2), []
    score = method.score
    method.score = lambda store, step, cut: (seen.append(cut.again), score(store, step, cut))[1]
    run(gqa, method.cache_for(gqa), torch.arange(60)[None], new=torch.arange(4)[None])
    assert seen == [False] * 2 + [True] * 4  # two layers


def test_a_draw_goes_by_position_whatever_was_dropped_before():
    sizes, scores, n = Sizes(1, 1, 0, 5, 1), torch.zeros(1, 4, 16), 16
    drawn = []
    for start in (0, 100):
        method, step = load_method("nacl"), step_of(n, 4, 4, start=start)
        store = Store()
        store.append(step.k, step.v, step.pos)
        method.sizes, method.proxy_scores = lambda _: sizes, lambda *args: scores
        drawn.append(method.score(store, step, context(store, step, 7)))
    assert not torch.equal(*drawn)


def test_a_budget_below_one_slot_keeps_the_newest_token():
    method = load_method("nacl", budget=0.05)
    assert [method.sizes(n)[:4] for n in (1, 12, 19)] == [(0, 1, 0, 0)] * 3
    assert [method.slots(n) for n in (1, 12, 400)] == [1, 1, 20]


def test_short_prompts_are_kept_whole_up_to_min_len(gqa):
    cache = load_method("nacl", budget=0.5, min_len=60).cache_for(gqa)
    run(gqa, cache, torch.arange(60)[None])
    assert len(kept(cache)) == 60


@pytest.mark.parametrize(
    "knobs",
    [{"preset": "mine"}, {"protect": 0.9}, {"proxy": 0.0}, {"temperature": 0.0}, {"decode_interval": 0}],
)
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        load_method("nacl", **knobs)
