"""Pins, and the nulls that a score is held against: who stays, how many, and how long."""

import json
import math

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.evicting.pin import Pin
from methods.core.eviction import Eviction
from methods.core.store import Store
from methods.full import Full
from methods.random import Random
from tests.bounds import bound, near, run_off
from tests.methods.conftest import kept, run
from tests.methods.layer import Spec, context, kept_after, scripted, step_of
from tests.tiny import METHODS, SIZES, padded_prompt
from tests.turns import taking_turns

BOUNDARY = {"at": "boundary", "first": 0.1, "newest": 0.1}
N, K = 90, 45


def method_of(name: str, **knobs):
    return load_method(name, **{**SIZES.get(name, {}), "budget": 0.5, **knobs})


DROPPING = [
    name
    for name in METHODS
    if isinstance(one := load_method(name), Eviction) and not isinstance(one, Full) and one.family != "mixed"
]
PINNED = [name for name in DROPPING if name != "streaming_llm"]


def layer_of(method: Eviction):
    (layer,) = method.caches(Spec(), None)
    return layer


def fed(layer, step) -> None:
    layer.append(step)
    layer.end_step(step)


def held(layer) -> list[list[int]]:
    return [sorted(pos[pos >= 0].tolist()) for pos in layer.store.pos[0]]


def one_shot(method: Eviction, n: int, heads: int = 1):
    """What the heads of a layer hold of a prompt of n tokens."""
    layer = layer_of(method)
    fed(layer, step_of(n, heads, heads, dim=2))
    return layer


NUMBERS = [0.31, 0.92, 0.05, 0.77, 0.48, 0.66, 0.12, 0.99, 0.27, 0.83, 0.54, 0.40]


@pytest.mark.parametrize(
    ("sizes", "random", "recency"),
    [
        ((0, 0), [1, 3, 5, 7, 9, 10], [6, 7, 8, 9, 10, 11]),
        ((1, 1), [0, 1, 3, 7, 9, 11], [0, 7, 8, 9, 10, 11]),
        ((2, 2), [0, 1, 7, 9, 10, 11], [0, 1, 8, 9, 10, 11]),
    ],
)
def test_hand_worked_sets(sizes, random, recency, monkeypatch):
    monkeypatch.setattr("methods.core.evicting.nulls.uniform", lambda *keys: torch.tensor([[NUMBERS]]))
    monkeypatch.setattr(Pin, "sizes", lambda self, kept: sizes)
    for name, expected in (("random", random), ("recency", recency)):
        assert held(one_shot(load_method(name, budget=0.5, pin="boundary"), 12)) == [expected]
        # and the same under another method's loop
        assert held(one_shot(load_method("tova", budget=0.5, pin="boundary", score_by=name), 12)) == [expected]


def test_the_boundary_is_a_share_of_the_slots_that_are_kept_and_four_at_least():
    assert [Pin("boundary").sizes(n) for n in (9, 49, 50, 256, 1024)] == [(4, 4), (4, 4), (5, 5), (25, 25), (102, 102)]
    assert Pin("boundary", first=0.29, newest=0).sizes(100) == (29, 0)
    assert [Pin("boundary").taken(1024, 4096), Pin("prompt").taken(1024, 4096), Pin("none").taken(9, 9)] == [
        204,
        4096,
        0,
    ]


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("pin", ["none", BOUNDARY])
def test_pins_count_inside_the_budget_and_stay_in_every_layer_and_head(name, pin, gqa):
    method = method_of(name, pin=pin)
    cache = method.cache_for(gqa)
    run(gqa, cache, torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(1)))
    own = method_of(name)
    target = own.slots(N)
    sets = [kept(cache, layer, 0, head) for layer in range(2) for head in range(2)]
    for layer in range(2):
        assert sum(len(s) for s in sets[2 * layer : 2 * layer + 2]) == 2 * target
    if pin != "none":
        first, newest = Pin.of(pin).sizes(target)
        assert all({*range(first), *range(N - newest, N)} <= set(s) for s in sets)
    assert cache.report().held_prompt - cache.report().overhead <= cache.report().asked


@pytest.mark.parametrize(("name", "knobs"), [
    *((name, {}) for name in ("h2o", "keyformer", "scissorhands", "nacl", "snapkv", "qfilters_capped")),
    ("tova", {"protect_last": True}),
])  # fmt: skip
def test_without_pins_what_a_method_protects_may_go(name, knobs, gqa):
    # the numbers of a null: by them every slot of a sample goes in some head, unless it is pinned
    ids = torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(1))
    sets = []
    for pin in ("own", "none"):
        cache = method_of(name, budget=34, pin=pin, score_by="random", **knobs).cache_for(gqa)
        run(gqa, cache, ids)
        sets.append([N - 1 in kept(cache, layer, 0, head) for layer in range(2) for head in range(2)])
    assert all(sets[0]) and not all(sets[1])


def test_own_pins_are_no_part_of_a_record_and_others_are():
    assert not {"pin", "score_by", "draw", "decode"} & set(load_method("snapkv").config())
    named = load_method("snapkv", pin="boundary", score_by="random", draw="fresh").config()
    assert [named[key] for key in ("pin", "score_by", "draw")] == ["boundary", "random", "fresh"]
    uneven = load_method("random", pin={"at": "boundary", "first": 0.2}, decode={"every": 8}).config()
    assert uneven["pin"] == {"at": "boundary", "first": 0.2, "newest": 0.1, "end": "moving"}
    assert uneven["decode"] == {"every": 8} and json.dumps(uneven)


@pytest.mark.parametrize("pin", ["none", BOUNDARY])
@pytest.mark.parametrize("score_by", ["own", "random", "recency", "random_in_counts"])
def test_at_budget_one_all_pins_and_nulls_are_the_full_cache(pin, score_by, gqa):
    ids, new = torch.arange(1, 61)[None], torch.arange(1, 7)[None]
    full = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    for name in ("snapkv", "h2o", "nacl"):
        cache = method_of(name, budget=1, pin=pin, score_by=score_by).cache_for(gqa)
        assert torch.equal(run(gqa, cache, ids, new=new), full)
        whole = method_of(name, budget=500, pin=pin, score_by=score_by).cache_for(gqa)
        assert kept_all(run_kept(gqa, whole, ids, new), 66)


def run_kept(model, cache, ids, new):
    run(model, cache, ids, new=new)
    return [kept(cache, layer, 0, head) for layer in range(2) for head in range(2)]


def kept_all(sets, n):
    return sets == [list(range(n))] * len(sets)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "nacl", "adakv"])
def test_a_boundary_of_no_shares_is_no_pin(name, gqa):
    ids, new = torch.arange(1, 91)[None], torch.arange(1, 7)[None]
    bare = {"at": "boundary", "first": 0, "newest": 0}
    assert run_kept(gqa, method_of(name, pin=bare).cache_for(gqa), ids, new) == run_kept(
        gqa, method_of(name, pin="none").cache_for(gqa), ids, new
    )


def test_recency_without_pins_is_the_window_and_with_the_first_four_streaming_llm(gqa):
    ids, mask = padded_prompt([90, 61])
    new = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(2))
    sinks = {"at": "boundary", "first": 0.01, "newest": 0}
    for pin, other in (
        ("none", load_method("window", budget=0.5)),
        ("own", load_method("window", budget=0.5)),
        (sinks, load_method("streaming_llm", budget=0.5, positions="original")),
    ):
        cache, theirs = load_method("recency", budget=0.5, pin=pin).cache_for(gqa), other.cache_for(gqa)
        ours, expected = run(gqa, cache, ids, new=new, mask=mask), run(gqa, theirs, ids, new=new, mask=mask)
        for layer, row, head in [(0, 0, 0), (1, 1, 1)]:
            assert kept(cache, layer, row, head) == kept(theirs, layer, row, head)
        near(ours, expected, run_off(expected))


class Constant(Eviction):
    """Every slot scores the same."""

    def score(self, store, step, cut):
        return torch.zeros(store.pos.shape)


def test_at_equal_scores_the_lowest_positions_and_the_pins_stay():
    assert held(one_shot(Constant(budget=20), 40)) == [list(range(20))]
    pinned = held(one_shot(Constant(budget=20, pin="boundary"), 40))
    assert pinned == [[*range(16), 36, 37, 38, 39]]


SURVIVAL = {"fresh": [0.75, 0.5625, 0.421875], "fixed": [0.75, 0.6, 0.5]}


@pytest.mark.parametrize("draw", SURVIVAL)
@pytest.mark.parametrize("name", ["random", "tova"])
def test_an_unpinned_slot_outlives_cuts_as_often_as_the_law_says(draw, name):
    # K = 10, 4 pinned, 2 tokens between cuts: K + r slots are cut down to K, and 8 slots are free at the first cut
    pin, heads = {"at": "boundary", "first": 0.1, "newest": 0}, 500
    knobs = {} if name == "random" else {"score_by": "random"}
    layer = layer_of(load_method(name, budget=10, pin=pin, draw=draw, decode={"every": 2}, **knobs))
    fed(layer, step_of(12, heads, heads, dim=2))
    for cut, expected in enumerate(SURVIVAL[draw]):
        if cut:
            for i in (2 * cut, 2 * cut + 1):
                fed(layer, step_of(1, heads, heads, dim=2, stage=Stage.DECODE, start=10 + i))
                assert layer.store.pos.shape[2] == 10 + (i % 2 == 0) or (layer.store.pos >= 0).sum(-1).max() <= 11
        sets = held(layer)
        assert {len(s) for s in sets} == {10}
        assert all(set(range(4)) <= set(s) for s in sets)
        alive = sum(4 <= pos < 12 for s in sets for pos in s)
        sigma = (heads * 8 * expected * (1 - expected)) ** 0.5
        assert abs(alive - heads * 8 * expected) < 4 * sigma


def test_one_prompt_leaves_middle_slots_by_the_odds_and_whole_needles_seldom():
    # n = 100, K = 50, 5 pinned at either end: 40 of 90 stay. Five tokens in a row: all in one head with .0150, and in
    # at least one of 8 heads with .114; one token is in none of 8 heads with .0091
    heads = 8000
    pos = one_shot(load_method("random", budget=0.5, pin="boundary"), 100, heads).store.pos[0]
    there = torch.zeros(heads, 100, dtype=torch.bool).scatter(1, pos.long(), True)
    assert there[:, :5].all() and there[:, 95:].all() and (there.sum(-1) == 50).all()
    needle = there[:, 40:45].all(-1)
    needles = math.comb(85, 35) / math.comb(90, 40)
    for found, p, n in (
        (there[:, 40].float().sum(), 4 / 9, heads),
        (needle.float().sum(), needles, heads),
        (needle.view(-1, 8).any(-1).float().sum(), 1 - (1 - needles) ** 8, heads / 8),
        ((~there[:, 40].view(-1, 8)).all(-1).float().sum(), (5 / 9) ** 8, heads / 8),
    ):
        assert abs(found - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    assert round(needles, 4) == 0.0150 and round(1 - (1 - needles) ** 8, 3) == 0.114


def test_heads_draw_apart_from_each_other():
    # two sets of K - p out of n - p share (K - p)^2 / (n - p) slots on average
    n, heads = 400, 64
    pos = one_shot(load_method("random", budget=100, pin="boundary"), n, heads).store.pos[0]
    there = torch.zeros(heads, n).scatter(1, pos.long(), 1.0)[:, 10:390]
    shared = (there @ there.T)[~torch.eye(heads, dtype=torch.bool)]
    expected = 80**2 / 380
    assert abs(shared.mean() - expected) < 0.2 and shared.std() > 1


def test_seeds_draw_different_sets_and_one_seed_the_same():
    first, again, other = (held(one_shot(load_method("random", seed=s, pin="boundary"), 80)) for s in (0, 0, 1))
    assert first == again != other


def test_a_null_in_a_methods_place_holds_what_the_baseline_holds(gqa):
    ids, new = torch.arange(1, 91)[None], torch.arange(1, 9)[None]
    for pin in ("none", BOUNDARY):
        random = run_kept(gqa, method_of("random", pin=pin).cache_for(gqa), ids, new)
        for name in ("snapkv", "nacl", "qfilters"):
            ours = run_kept(gqa, method_of(name, pin=pin, score_by="random", budget=0.5).cache_for(gqa), ids, new)
            if name != "nacl":  # whose counts are cut
                assert ours == random
        recency = run_kept(gqa, method_of("recency", pin=pin).cache_for(gqa), ids, new)
        assert run_kept(gqa, method_of("h2o", pin=pin, score_by="recency").cache_for(gqa), ids, new) == recency


def test_a_null_inside_a_methods_own_counts_keeps_as_many_of_other_slots(gqa):
    ids, new = torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(1)), torch.arange(1, 9)[None]
    for pin in ("own", BOUNDARY):
        knobs = {"pin": pin, "allocator": {"alpha": 0.0}}
        own, drawn, even = (
            run_kept(gqa, method_of("adakv", score_by=score_by, **knobs).cache_for(gqa), ids, new)
            for score_by in ("own", "random_in_counts", "random")
        )
        assert [len(s) for s in drawn] == [len(s) for s in own] and drawn != own
        assert len({len(s) for s in own}) > 1
        assert drawn != even
    # where every head keeps as many, it is the random null
    same = [run_kept(gqa, method_of("snapkv", pin=BOUNDARY, score_by=s).cache_for(gqa), ids, new)
            for s in ("random_in_counts", "random")]  # fmt: skip
    assert same[0] == same[1]


def test_an_unpinned_window_scores_by_the_mean_of_the_queries_that_see_it():
    # three queries vote, at positions 3, 4, 5; each row is one query's attention
    rows = [{}, {}, {}, {0: 0.4, 1: 0.15, 2: 0.15, 3: 0.3}, {0: 0.1, 1: 0.2, 2: 0.1, 3: 0.1, 4: 0.5},
            {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.2, 4: 0.4, 5: 0.1}]  # fmt: skip
    step = scripted([rows])
    method, store = load_method("snapkv", budget=4, window=3, kernel=1, pin="none"), Store()
    store.append(step.k, step.v, step.pos)
    scores = method.score(store, step, context(store, step, 4))[0, 0]
    expected = torch.tensor([0.6 / 3, 0.45 / 3, 0.35 / 3, 0.6 / 3, 0.9 / 2, 0.1])
    near(scores, expected, bound(torch.float32, 6, math.log(10), size=1, width=16))
    assert kept_after(layer_of(method), step) == [0, 1, 3, 4]
    assert kept_after(layer_of(load_method("snapkv", budget=4, window=3, kernel=1)), step) == [0, 3, 4, 5]


def test_the_prompts_own_end_stays_for_good_and_the_moving_one_moves(gqa):
    ids, new = torch.arange(1, 41)[None], torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(2))
    for end, newest in (("prompt", range(36, 40)), ("moving", range(60, 64))):
        pin = {"at": "boundary", "end": end}
        for name in ("h2o", "recency", "random"):
            knobs = {"decode": {"every": 4}} if name == "random" else {}
            sets = run_kept(gqa, method_of(name, pin=pin, **knobs).cache_for(gqa), ids, new)
            assert all({*range(4), *newest} <= set(s) for s in sets)
            assert {len(s) for s in sets} == {20}


def test_a_pinned_prompt_leaves_the_cuts_to_what_is_generated(gqa):
    ids, new = torch.arange(1, 21)[None], torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(2))
    for name, knobs in (("h2o", {}), ("random", {"decode": {"every": 5}})):
        sets = run_kept(gqa, method_of(name, budget=30, pin="prompt", **knobs).cache_for(gqa), ids, new)
        assert all(set(range(20)) <= set(s) and len(s) == 30 for s in sets)
    # a prompt that fills the budget by itself is held at the floor: itself and one slot
    short = method_of("h2o", budget=15, pin="prompt").cache_for(gqa)
    assert {len(s) for s in run_kept(gqa, short, ids, new)} == {21}


@pytest.mark.parametrize("name", taking_turns(PINNED, of=2))
def test_rows_and_chunks_decide_nothing_under_pins(name, gqa):
    knobs = {} if method_of(name).drops_later or name == "qfilters" else {"decode": {"every": 4}}
    method = method_of(name, pin={"at": "boundary", "newest": 0.2, "end": "prompt"}, **knobs)
    ids, mask = padded_prompt([90, 61])
    new = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    batch = method.cache_for(gqa, samples=[7, 8])
    run(gqa, batch, ids, new=new, mask=mask)
    for row, n in enumerate([90, 61]):
        alone = method.cache_for(gqa, prompt_len=n, samples=[7 + row])
        run(gqa, alone, ids[row : row + 1, 90 - n :], chunks=[40, n - 40], new=new[row : row + 1])
        assert [kept(batch, i, row, i) for i in (0, 1)] == [kept(alone, i, 0, i) for i in (0, 1)]


def test_a_prompt_that_its_pins_would_fill_is_held_at_the_floor_and_counted(gqa):
    cache = load_method("random", budget=0.2, pin="boundary").cache_for(gqa)
    run(gqa, cache, torch.arange(1, 31)[None])  # 6 slots, of which 8 are pinned
    assert [len(kept(cache, layer, 0, head)) for layer in (0, 1) for head in (0, 1)] == [9] * 4
    assert cache.report().held_prompt > cache.report().asked + cache.report().overhead
    tiny = load_method("random", budget=0.2, pin="boundary").cache_for(gqa)
    run(gqa, tiny, torch.arange(1, 7)[None])
    assert kept(tiny) == list(range(6))


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("snapkv", {"pin": "some"}, r"method.pin=some: it is one of own, none, boundary, prompt"),
        ("random", {"pin": "boundary", "budget": 8}, r"method.pin=boundary: pins 8 slots, and budget=8 .* it to 9,"),
        ("h2o", {"pin": {**BOUNDARY, "first": 0.6, "newest": 0.4}}, r"method.pin.first=0.6, method.pin.newest=0.4"),
        ("h2o", {"pin": {"at": "none", "first": 0.2}}, r"method.pin.at=none: takes no shares"),
        ("h2o", {"pin": {"at": "boundary", "end": "last"}}, r"method.pin.end=last: it is one of moving, prompt"),
        ("h2o", {"pin": {"at": "boundary", "begin": 0.2}}, r"method.pin.begin: no such setting"),
        ("h2o", {"pin": "prompt"}, r"method.pin=prompt: budget=0.5 keeps a part of the prompt's slots"),
        ("snapkv", {"pin": "prompt", "budget": 4096}, r"method.pin=prompt: budget=4096 drops slots at the"),
        ("kivi", {"pin": "none"}, r"method.pin=none: Codec ranks no slots"),
        ("lococo", {"pin": "boundary", "budget": 64}, r"method.pin=boundary: LoCoCo ranks no slots"),
        ("kivi", {"draw": "fresh"}, r"method.draw=fresh: Codec ranks no slots"),
        ("streaming_llm", {"pin": "boundary"}, r"method.pin=boundary: StreamingLLM is .* method=recency takes it"),
        ("streaming_llm", {"score_by": "random"}, r"method.score_by=random: StreamingLLM is recency"),
        ("snapkv", {"score_by": "chance"}, r"method.score_by=chance: it is one of own, random"),
        ("snapkv", {"draw": "fresh"}, r"method.draw=fresh: SnapKV draws nothing"),
        ("random", {"draw": "new"}, r"method.draw=new: it is one of fixed, fresh"),
        ("random", {"decode": {"every": 0}}, r"method.decode.every=0: give a whole number, 1 or more"),
        ("qfilters", {"decode": {"every": 8}}, r"method.decode.every=8: QFilters forgets"),
        ("nacl", {"decode": {"every": 8}, "decode_interval": 8}, r"they say the same, give one"),
    ],
)  # fmt: skip
def test_what_cannot_be_pinned_drawn_or_cut_is_refused_by_name(name, knobs, said):
    with pytest.raises(UserError, match=said):
        load_method(name, **knobs)


def test_a_method_that_merges_what_it_drops_has_no_score_by_itself():
    class Merging(Random):
        """Folds what goes into what stays."""

        def before_drop(self, store, keep): ...

    for knobs in ({"pin": "none"}, {"score_by": "recency"}):
        with pytest.raises(UserError, match="merges what it drops"):
            Merging(budget=0.5, **knobs)
    Merging(budget=0.5)


def test_a_score_that_protects_by_itself_is_not_taken_for_an_unpinned_one():
    class Old(Random):
        """Says what stays by an infinite score."""

        def score(self, store, step, cut):
            return super().score(store, step, cut).masked_fill(cut.age_rank >= cut.n - 2, torch.inf)

    assert held(one_shot(Old(budget=5), 20))[0][-2:] == [18, 19]
    with pytest.raises(UserError, match=r"method.pin=none: score gives \+inf"):
        one_shot(Old(budget=5, pin="none"), 20)


def test_a_new_method_takes_pins_without_a_word_about_them_in_its_file():
    class Shortest(Eviction):
        """Keeps the shortest keys and the newest five."""

        def score(self, store, step, cut):
            return -store.read()[0].float().norm(dim=-1)

        def protected(self, store, step, cut):
            return cut.age_rank >= cut.n - 5

    own, none, boundary = (held(one_shot(Shortest(budget=20, pin=pin), 60))[0] for pin in ("own", "none", "boundary"))
    assert set(range(55, 60)) <= set(own)
    norms = step_of(60, dim=2).k.norm(dim=-1)[0, 0]
    assert none == sorted(norms.argsort()[:20].tolist())
    assert {*range(4), *range(56, 60)} <= set(boundary) and len(boundary) == 20
