"""Scissorhands against the cases worked by hand and a plain count of votes."""

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from tests.bounds import bound, near
from tests.methods.conftest import kept, run
from tests.methods.layer import Spec, context, filled, kept_after, scripted, step_of

ROW_4 = dict(enumerate([0.50, 0.05, 0.22, 0.13, 0.10]))
ROW_5 = dict(enumerate([0.40, 0.18, 0.02, 0.25, 0.05, 0.10]))


def layer(**knobs):
    return load_method("scissorhands", **knobs).caches(Spec, None)[0]


def by_hand(**knobs) -> list[int]:
    """What stays of six tokens when the last two queries vote and the cache is full at six."""
    cache = layer(budget=6, recent=1, history=2, **knobs)
    assert kept_after(cache, scripted([[{}] * 4 + [ROW_4]])) == [0, 1, 2, 3, 4]
    return kept_after(cache, scripted([[ROW_5]], start=5, stage=Stage.DECODE))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"drop": 3}, [0, 1, 5]),
        ({"drop": 3, "tie": "prob"}, [0, 3, 5]),
        ({"drop": 1}, [0, 1, 2, 3, 5]),
        ({"drop": 0.5}, [0, 1, 5]),
    ],
)
def test_hand_worked_votes(knobs, expected):
    assert by_hand(**knobs) == expected


def test_an_even_share_is_no_vote_against():
    cache = layer(budget=30)
    kept_after(cache, scripted([[{}, {0: 0.75, 1: 0.25}, {}, {}]]))
    votes = cache.method._votes(cache.store)[0, 0, :, 0].tolist()
    # the first query sees itself alone and the last gives a quarter to each; thirds are not exact
    assert [vote & 0b1011 for vote in votes] == [0, 0b10, 0, 0]


def test_at_the_prompts_end_the_last_queries_vote_each_with_its_own_share():
    # the same rows as a prompt: five slots are the full cache, so six tokens are cut to 5 - 2
    cache = layer(budget=5, recent=1, history=2, drop=2)
    assert kept_after(cache, scripted([[{}] * 4 + [ROW_4, ROW_5]])) == [0, 1, 5]


def test_the_cache_grows_to_the_budget_falls_and_grows_again(gqa):
    method = load_method("scissorhands", budget=0.5, drop=0.4, recent=3, history=20)
    cache = method.cache_for(gqa)
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    run(gqa, cache, ids)
    sizes, sets = [], [set(kept(cache, 1))]
    assert len(sets[0]) == 18  # 30 less 12
    for i in range(60, 100):
        with torch.no_grad():
            gqa(ids[:, i - 60 : i - 59], past_key_values=cache, use_cache=True)
        sets.append(set(kept(cache, 1)))
        sizes.append(len(sets[-1]))
        assert {i, i - 1, i - 2} <= sets[-1]
        if sizes[-1] > 18:
            assert sets[-2] <= sets[-1], "between drops nothing leaves"
    assert sizes == ([*range(19, 30), 18] * 4)[:40]


def votes_by_hand(model_rows: list[dict[int, float]], held: list[int], window: int) -> dict[int, int]:
    counts = dict.fromkeys(held, 0)
    for row in model_rows[-window:]:
        for pos, p in row.items():
            if pos in counts:
                counts[pos] += p < 1 / len(row)
    return counts


@pytest.mark.parametrize("history", [3, 8, 13])
def test_votes_of_a_long_run_are_those_counted_one_by_one(history):
    # through several drops, in chunks and steps: every query's row is recomputed densely over what was held then
    cache = load_method("scissorhands", budget=14, recent=2, drop=5, history=history).caches(Spec, 24)[0]
    rows, held = [], []
    stream = step_of(60, heads=2, dim=8)
    at = 0
    for size, stage in [(9, Stage.MID_PROMPT), (15, Stage.ENDS_PROMPT)] + [(1, Stage.DECODE)] * 20 + [(9, Stage.TURN)]:
        step = step_of(size, heads=2, dim=8, stage=stage, start=at)
        step.q, step.k, step.v = (x[:, :, at : at + size] for x in (stream.q, stream.k, stream.v))
        for i in range(at, at + size):
            held.append(i)
            x = stream.q[0, :, i] @ stream.k[0, 0, held].T * step.rules.scale  # [2, n]
            rows.append(dict(zip(held, x.softmax(-1).mean(0).tolist(), strict=True)))
        expected = held
        full = len(held) >= 14 if stage is not Stage.ENDS_PROMPT else len(held) > 14
        if full and stage is not Stage.MID_PROMPT:
            counts = votes_by_hand(rows, held, history)
            safe = held[-2:]
            worst_first = sorted(set(held) - set(safe), key=lambda p: (-counts[p], -p))
            expected = sorted(set(held) - set(worst_first[: len(held) - 9]))
        held = kept_after(cache, step)
        assert held == expected
        at += size


def test_history_one_and_dropping_one_is_tova_per_head():
    # shares are all below even, so that only the attention decides
    rows = [{p: 0.1 + 0.01 * ((p * 7) % 5) for p in range(n)} for n in range(1, 13)]
    scissors = layer(budget=5, recent=0, drop=1, history=1, tie="prob")
    tova = load_method("tova", budget=4, granularity="kv_head").caches(Spec, None)[0]
    scissors.method._write = _all_low(scissors.method)
    for cache in (scissors, tova):
        kept_after(cache, scripted([[{}] * 3 + [rows[3]]]))
    for n in range(4, 12):
        step = scripted([[rows[n]]], start=n, stage=Stage.DECODE)
        assert kept_after(scissors, step) == kept_after(tova, step)


def _all_low(method):
    """The method's record of a query, every vote forced to be against."""
    write = type(method)._write

    def forced(store, step, q_pos, p):
        write(method, store, step, q_pos, p)
        method._votes(store).fill_(1)

    return forced


def test_votes_per_chance_spare_the_old():
    # token 3 had two chances and took both, token 0 had three and took two
    step = scripted([[{}, {}, {}, {}]])
    plain, fair = (load_method("scissorhands", budget=20, history=4, recent=0, normalise=n) for n in (False, True))
    scores = []
    for method in (plain, fair):
        store = filled(4)
        method._votes(store)[0, 0, :, 0] = torch.tensor([0b1110, 0b0010, 0b1100, 0b1000])
        scores.append(method.score(store, step, context(store, step, 3))[0, 0].tolist())
    assert scores[0] == [-3, -1, -2, -1]
    near(scores[1], [-3 / 4, -1 / 3, -2 / 2, -1], bound(torch.float32, 1))


def test_no_slot_has_more_chances_than_the_history_is_long():
    method, store = load_method("scissorhands", budget=20, history=2, recent=0, normalise=True), filled(6)
    method._votes(store)[0, 0, :, 0] = torch.tensor([0b11, 0b01, 0b00, 0b10, 0b11, 0b10])
    scores = method.score(store, step_of(6), context(store, step_of(6), 5))[0, 0]
    assert scores.tolist() == [-1, -0.5, 0, -0.5, -1, -1]


@pytest.mark.parametrize("normalise", [False, True])
def test_attention_decides_between_equal_votes_only(normalise):
    # of four queries: token 0 has 3 votes of 4 chances and much attention, token 1 has 2 of 3 and next to none
    step = scripted([[{}, {}, {}, {}]])
    method = load_method("scissorhands", budget=20, history=4, recent=0, tie="prob", normalise=normalise)
    store = filled(4)
    method._votes(store)[0, 0, :, 0] = torch.tensor([0b0111, 0b0110, 0b0100, 0b1000])
    method._seen(store)[0, 0] = torch.tensor([[0.9] * 4, [0.0, 0.01, 0.0, 0.0], [0.0, 0.0, 0.3, 0.0], [0.2] * 4])
    scores = method.score(store, step, context(store, step, 3))[0, 0]
    # votes against per chance are 3/4, 2/3, 1/2, 1/1; plain votes 3, 2, 1, 1, and of the last two 2 has less attention
    expected = [3, 0, 1, 2] if normalise else [0, 1, 2, 3]
    assert scores.argsort().tolist() == expected
    # where both are equal nothing decides, so that the newer goes
    method._votes(store)[0, 0, :, 0], method._seen(store)[0, 0] = 0b0001, 0.5
    if not normalise:
        assert len(set(method.score(store, step, context(store, step, 3))[0, 0].tolist())) == 1


@pytest.mark.parametrize("drop", [1, 5])
def test_a_prompt_read_token_by_token_falls_and_grows_as_decoding_does(drop):
    method = load_method("scissorhands", budget=14, recent=2, drop=drop, history=6, evict="per_chunk")
    stream, n, began = step_of(40, heads=2, dim=8), 40, 6
    reading, decoding = method.caches(Spec, n)[0], method.caches(Spec, None)[0]

    def piece(at: int, size: int, stage: Stage):
        step = step_of(size, heads=2, dim=8, stage=stage, start=at)
        step.q, step.k, step.v = (x[:, :, at : at + size] for x in (stream.q, stream.k, stream.v))
        return step

    sets = [kept_after(reading, piece(i, 1, Stage.ENDS_PROMPT if i == n - 1 else Stage.MID_PROMPT)) for i in range(n)]
    sizes, teeth = [len(one) for one in sets], [14 - drop + i % drop for i in range(n)]
    assert sizes == [*range(1, 14), *teeth][:n]
    assert kept_after(decoding, piece(0, began, Stage.ENDS_PROMPT)) == sets[began - 1]
    for i in range(began, n):
        assert kept_after(decoding, piece(i, 1, Stage.DECODE)) == sets[i]


@pytest.mark.parametrize("drop", [1, 4])
def test_a_prompt_that_fills_the_cache_stays_and_falls_with_the_next_token(drop):
    cache = load_method("scissorhands", budget=12, recent=2, drop=drop, history=6).caches(Spec, None)[0]
    assert len(kept_after(cache, step_of(12))) == 12
    sizes = [len(kept_after(cache, step_of(1, stage=Stage.DECODE, start=i))) for i in range(12, 21)]
    assert sizes == [12 - drop + i % drop for i in range(9)]


def test_bytes_of_the_votes_are_bits(gqa):
    cache = load_method("scissorhands", budget=0.5, history=20).cache_for(gqa)
    run(gqa, cache, torch.arange(60)[None])
    store = cache.layers[0].inner.store
    assert store.buffers["votes"].shape == (1, 2, 15, 3) and store.buffers["votes"].element_size() == 1
    report = cache.report()
    assert report.held_prompt == 2 * 2 * 15 * 16 * 2 * 4 + report.overhead
    assert report.overhead == 2 * 2 * 15 * (3 + 4)


def test_the_smallest_cache_holds_what_is_recent_and_one_more():
    method = load_method("scissorhands", budget=0.01)
    assert method.full(100) == 21 and method.target_size(100) == 11
    assert load_method("scissorhands", budget=0.01, drop=7).full(100) == 18


@pytest.mark.parametrize(
    "knobs", [{"history": 0}, {"recent": -1}, {"drop": 0}, {"drop": 2.5}, {"tie": "luck"}, {"budget": 20}]
)
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        load_method("scissorhands", **knobs)
