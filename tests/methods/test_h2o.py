"""H2O against the case worked by hand and against dense rows in float64."""

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from tests.bounds import SHARP, bound, half_digit, near, run_off
from tests.methods.conftest import kept, run
from tests.methods.dense import HeavyHitters, Recorded, check
from tests.methods.layer import Spec, context, filled, kept_after, scripted, step_of
from tests.tiny import feed, tiny_model

ROWS = [
    [1.0],
    [0.6, 0.4],
    [0.5, 0.2, 0.3],
    [0.4, 0.1, 0.2, 0.3],
    [0.3, 0.05, 0.15, 0.4, 0.1],
    [0.3, 0.05, 0.1, 0.35, 0.1, 0.1],
]
SUMS = [3.1, 0.8, 0.75, 1.05, 0.2, 0.1]


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def layer(**knobs):
    return load_method("h2o", **knobs).caches(Spec, None)[0]


def prompt():
    return scripted([[dict(enumerate(row)) for row in ROWS]])


def sums(cache) -> dict[int, float]:
    """Collected attention by position, to four digits."""
    store = cache.store
    pairs = zip(store.pos[0, 0].tolist(), store.track("mass")[0, 0].tolist(), strict=True)
    return {p: round(s, 4) for p, s in pairs if p >= 0}


def test_hand_worked_prompt_and_three_steps():
    whole = layer(budget=100)
    kept_after(whole, prompt())
    assert sums(whole) == dict(enumerate(SUMS))

    cache = layer(budget=4)
    assert kept_after(cache, prompt()) == [0, 3, 4, 5]

    def step(pos, held, row):
        return kept_after(cache, scripted([[dict(zip(held, row, strict=True))]], start=pos, stage=Stage.DECODE))

    assert step(6, [0, 3, 4, 5, 6], [0.1, 0.1, 0.5, 0.2, 0.1]) == [0, 3, 5, 6]
    assert sums(cache) == {0: 3.2, 3: 1.15, 5: 0.3, 6: 0.1}
    assert step(7, [0, 3, 5, 6, 7], [0.01, 0.01, 0.9, 0.05, 0.03]) == [0, 5, 6, 7]
    assert sums(cache) == {0: 3.21, 5: 1.2, 6: 0.15, 7: 0.03}
    assert step(8, [0, 5, 6, 7, 8], [0.1, 0.2, 0.4, 0.2, 0.1]) == [0, 5, 7, 8]


def test_attention_per_query_orders_otherwise():
    method, store = load_method("h2o", budget=4, normalise=True, heavy=1.0), filled(6)
    store.add("mass", torch.tensor(SUMS)[None, None])
    scores = method.score(store, step_of(6), context(store, step_of(6), 4))[0, 0]
    near(scores, [0.5167, 0.16, 0.1875, 0.35, 0.1, 0.1], half_digit(4) + bound(torch.float32, 6, size=3.1))
    assert scores[:4].topk(2).indices.tolist() == [0, 3] and scores[2] > scores[1]


def test_every_query_gives_one_in_all_for_each_of_its_heads(any_heads):
    cache = load_method("h2o", budget=100).cache_for(any_heads)
    run(any_heads, cache, tokens(60))
    store = cache.layers[1].inner.store
    group = 4 // store.pos.shape[1]
    near(store.track("mass").sum(-1), 60 * group, bound(torch.float32, 60, SHARP, size=60 * group, width=16))


@pytest.mark.parametrize("chunks", [None, [13, 30, 17]])
def test_sums_and_sets_are_those_of_dense_rows_in_float64(chunks, any_heads):
    ids, new = tokens(60), tokens(25, seed=2)
    cache = load_method("h2o", budget=0.4).cache_for(any_heads, prompt_len=60)
    recorded = [Recorded(cache, index) for index in range(2)]
    run(any_heads, cache, ids, chunks=chunks, new=new)
    for index in range(2):
        heads = range(len(recorded[index].k[0]))
        hand = [HeavyHitters(recorded[index].softmax, h, 24, 12) for h in heads]
        for one in hand:
            one.prompt(60)
            for i in range(60, 85):
                one.step(i)
        check(cache.layers[index], "mass", hand)


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "mpt", "qwen3", "falcon-mqa"])
def test_other_architectures_collect_the_attention_they_use(arch):
    model = tiny_model(arch)
    ids = tokens(50)
    cache = load_method("h2o", budget=0.4, heavy=0.25).cache_for(model)
    recorded = Recorded(cache, 1)
    feed(model, cache, ids, torch.ones_like(ids), [30] + [1] * 20)
    hand = [HeavyHitters(recorded.softmax, h, 12, 9) for h in range(len(recorded.k[0]))]
    for one in hand:
        one.prompt(30)
        for i in range(30, 50):
            one.step(i)
    check(cache.layers[1], "mass", hand)


def test_padding_gives_no_attention_and_gets_none(gqa):
    ids, mask = tokens(60).expand(2, -1).clone(), torch.ones(2, 60, dtype=torch.long)
    mask[1, :23] = 0
    cache = load_method("h2o", budget=0.4).cache_for(gqa)
    recorded = Recorded(cache, 1, row=1)
    run(gqa, cache, ids, mask=mask, new=tokens(9, seed=2).expand(2, -1))
    hand = [HeavyHitters(recorded.softmax, h, 14, 7) for h in range(2)]  # 0.4 of 37
    for one in hand:
        one.prompt(37)
        for i in range(37, 46):
            one.step(i)
    check(cache.layers[1], "mass", hand, row=1)


def test_without_heavy_hitters_it_is_the_plain_window(gqa):
    ids, new = tokens(60), tokens(20, seed=2)
    plain, window = load_method("h2o", budget=0.3, heavy=0.0).cache_for(gqa), load_method("window", budget=0.3)
    window = window.cache_for(gqa)
    a, b = run(gqa, plain, ids, new=new), run(gqa, window, ids, new=new)
    near(a, b, run_off(b))
    assert kept(plain, 1) == kept(window, 1)


def test_without_recent_tokens_the_newest_may_go_at_once():
    cache = layer(budget=4, heavy=1.0)
    assert kept_after(cache, prompt()) == [0, 1, 2, 3]
    row = {0: 0.9, 1: 0.02, 2: 0.02, 3: 0.02, 6: 0.04}
    assert kept_after(cache, scripted([[row]], start=6, stage=Stage.DECODE)) == [0, 1, 2, 3]


def test_a_share_outside_the_unit_interval_is_named():
    with pytest.raises(UserError, match=r"method\.heavy=1\.5"):
        load_method("h2o", heavy=1.5)
