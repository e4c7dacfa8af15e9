"""SnapKV against small cases worked by hand."""

import pytest
import torch

from kernels import Rules
from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from tests.bounds import bound, half_digit, near, run_off
from tests.methods.conftest import kept, run
from tests.methods.layer import context, filled, ranked, step_of


def keep(scores: list[float], budget: int, **knobs) -> list[int]:
    """What stays of 10 tokens, the last 2 of them the window, when earlier tokens have these scores."""
    method = load_method("snapkv", budget=budget, window=2, **knobs)
    mass = torch.tensor(scores + [9.0, 9.0])[None, None]  # the window's own columns must not count
    store, step = filled(10), step_of(10)
    method.window_scores = lambda *args: mass
    scores = ranked(method, store, step, context(store, step, budget))
    mask = method.allocator.pick(scores, torch.tensor([budget]))
    return mask[0, 0].nonzero().flatten().tolist()


SCORES = [0.50, 0.02, 0.03, 0.30, 0.01, 0.02, 0.40, 0.05]


@pytest.mark.parametrize(
    ("pooling", "kernel", "budget", "expected"),
    [
        ("avg", 3, 5, [0, 1, 6, 8, 9]),
        ("max", 3, 4, [0, 1, 8, 9]),
        ("max", 3, 7, [0, 1, 5, 6, 7, 8, 9]),
        ("max", 3, 5, [0, 1, 5, 8, 9]),  # three slots tie, the lowest wins
        ("max", 1, 5, [0, 3, 6, 8, 9]),
    ],
)
def test_hand_worked_scores(pooling, kernel, budget, expected):
    assert keep(SCORES, budget, pooling=pooling, kernel=kernel) == expected


def test_average_pooling_counts_the_missing_neighbour_as_zero():
    pooled = load_method("snapkv", pooling="avg", kernel=3).pool(torch.tensor(SCORES)[None, None])[0, 0]
    by_hand = [0.1733, 0.1833, 0.1167, 0.1133, 0.1100, 0.1433, 0.1567, 0.1500]
    near(pooled, by_hand, half_digit(4) + bound(torch.float32, 3))


def test_exactly_the_budget_stays_and_the_window_with_it(gqa):
    cache = load_method("snapkv", budget=40, window=8).cache_for(gqa)
    run(gqa, cache, torch.arange(90)[None] % 97)
    for head in range(2):
        positions = kept(cache, 1, 0, head)
        assert len(positions) == len(set(positions)) == 40
        assert positions[-8:] == list(range(82, 90))


def test_queries_before_the_window_have_no_vote(gqa):
    method, step = load_method("snapkv", budget=30, window=4), step_of(60, heads=4, kv_heads=2)
    first, second = (method.caches(_Spec, None)[0] for _ in range(2))
    shuffled = step.q.clone()
    shuffled[:, :, :56] = step.q[:, :, torch.randperm(56)]
    for cache, q in ((first, step.q), (second, shuffled)):
        step.q = q
        cache.append(step)
        cache.end_step(step)
    assert torch.equal(first.store.pos, second.store.pos)


def test_a_sliding_layer_that_has_dropped_slots_holds_none_that_the_next_query_does_not_see():
    layer, window = load_method("snapkv", budget=5, window=2, kernel=1).caches(_Spec, None)[0], 9
    held, trimmed = [], 0
    for i in range(20, 50):
        step = step_of(20) if i == 20 else step_of(1, stage=Stage.DECODE, start=i - 1)
        step.rules = Rules(1.0, window=window)
        layer.append(step)
        layer.attend(step)
        layer.end_step(step)
        now = layer.store.pos[0, 0].tolist()
        if i > 20 and now != [*held, i - 1]:
            trimmed += 1
            assert now == [p for p in [*held, i - 1] if p > i - window]
        held = now
    assert trimmed > 5


@pytest.mark.parametrize(("budget", "asked"), [(0.3, 6989), (60, 60 * 256), (1000, 91 * 256)])  # 6,988.8
def test_a_share_of_the_bytes_is_rounded_up_to_whole_ones(budget, asked):
    layer, step = load_method("snapkv", budget=budget).caches(_Spec, None)[0], step_of(91)
    assert layer.budget_bytes([91 * 256]) == [91 * 256]  # before the prompt has ended
    layer.append(step)
    layer.end_step(step)
    assert layer.budget_bytes([91 * 256]) == [asked]


class _Spec:
    n_layers = 1


def test_heads_of_a_group_score_together_pool_first_then_mean():
    method = load_method("snapkv", budget=4, window=2, kernel=3)
    store, step = filled(6), step_of(6, heads=2)
    method.window_scores = lambda *args: torch.tensor([[[0.0, 1.0, 0, 0, 0, 0], [0, 0, 0, 1.0, 0, 0]]])
    # pooled rows are (1, 1, 1, 0) and (0, 0, 1, 1): the mean puts slot 2, which no head scored, first
    assert method.score(store, step, context(store, step, 4))[0, 0, :4].tolist() == [0.5, 0.5, 1.0, 0.5]


def test_the_smallest_cache_is_the_window_and_one():
    method = load_method("snapkv", budget=0.01)
    assert method.slots(100) == 33
    assert step_of(3).stage is Stage.ENDS_PROMPT


@pytest.mark.parametrize("knobs", [{"window": 0}, {"kernel": 4}, {"pooling": "median"}, {"budget": 32}])
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        load_method("snapkv", **knobs)


def test_a_window_of_all_queries_scores_by_column_sums():
    method, step = load_method("snapkv", budget=20, window=19, kernel=1), step_of(20)
    store = filled(20)
    cut = context(store, step, 20)
    x = step.q[0, 0] @ step.k[0, 0].T * step.rules.scale
    p = x.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    columns = p[1:].sum(0)
    off = 2 * bound(torch.float32, 20, x.abs().max().item(), size=columns.max().item(), width=8)
    near(method.score(store, step, cut)[0, 0, :1], columns[:1], off)
    near(method.window_scores(store, step, cut)[0, 0], columns, off)


def test_a_sliding_layer_lets_go_of_what_no_later_query_sees(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=16)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids, new = torch.arange(40)[None], (torch.arange(90)[None] * 7) % 97
    cache = load_method("snapkv", budget=12, window=4).cache_for(model)
    trimmed = run(model, cache, ids, new=new)
    assert len(cache.layers[0].inner.store) < 16 + 64
    monkeypatch.setattr("methods.core.evicting.layer.spare", lambda window: 1000)
    whole = load_method("snapkv", budget=12, window=4).cache_for(model)
    near(run(model, whole, ids, new=new), trimmed, run_off(trimmed))
    assert len(whole.layers[0].inner.store) == 12 + 90
