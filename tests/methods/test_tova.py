"""TOVA against the cases worked by hand."""

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from tests.bounds import bound, near
from tests.methods.conftest import kept, run
from tests.methods.layer import Spec, context, filled, kept_after, scripted, step_of

#: attention of the last of five queries, per query head
ROWS = [[0.40, 0.05, 0.15, 0.10, 0.30], [0.20, 0.25, 0.05, 0.10, 0.40]]


def prompt():
    return scripted([[{}] * 4 + [dict(enumerate(row))] for row in ROWS])


def decode(pos: int, row: dict[int, float]):
    return scripted([[row]] * 2, start=pos, stage=Stage.DECODE)


def layer(**knobs):
    return load_method("tova", **knobs).caches(Spec, None)[0]


def test_the_mean_over_heads_decides_for_the_layer():
    assert kept_after(layer(budget=3), prompt()) == [0, 1, 4]


def test_at_equal_attention_the_lower_position_stays():
    method, store = load_method("tova", budget=4), filled(5)
    scores = method.score(store, step_of(5), context(store, step_of(5), 4, mass=torch.tensor([ROWS])))
    near(scores[0, 0], [0.30, 0.15, 0.10, 0.10, 0.35], bound(torch.float32, 2))
    scores[0, 0, 2] = scores[0, 0, 3]
    assert method.allocator.pick(scores, torch.tensor([4]))[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_each_kv_head_may_decide_for_itself():
    method, step = load_method("tova", budget=3, granularity="kv_head"), step_of(5, 2, 2)
    scores = method.score(filled(5, 2), step, context(filled(5, 2), step, 3, mass=torch.tensor([ROWS])))
    mask = method.allocator.pick(scores, torch.tensor([3]))[0]
    assert [m.nonzero().flatten().tolist() for m in mask] == [[0, 2, 4], [0, 1, 4]]


@pytest.mark.parametrize(("protect_last", "last"), [(False, [0, 4, 5]), (True, [0, 4, 6])])
def test_while_decoding_the_newest_token_may_go_at_once(protect_last, last):
    cache = layer(budget=3, protect_last=protect_last)
    assert kept_after(cache, prompt()) == [0, 1, 4]
    assert kept_after(cache, decode(5, {0: 0.50, 1: 0.05, 4: 0.20, 5: 0.25})) == [0, 4, 5]
    assert kept_after(cache, decode(6, {0: 0.60, 4: 0.20, 5: 0.15, 6: 0.05})) == last


def test_while_decoding_the_newest_of_equal_tokens_goes():
    cache = layer(budget=3)
    kept_after(cache, prompt())
    assert kept_after(cache, decode(5, {})) == [0, 1, 4]


def test_all_heads_of_a_layer_hold_the_same_tokens(any_heads):
    cache = load_method("tova", budget=0.4).cache_for(any_heads)
    run(any_heads, cache, torch.arange(60)[None], new=torch.arange(9)[None])
    for index in range(2):
        pos = cache.layers[index].inner.store.pos[0]
        assert (pos == pos[:1]).all()
    assert kept(cache, 0) != kept(cache, 1)


def test_only_the_last_query_votes():
    sets = []
    for seed in (0, 1):
        cache, step = layer(budget=12), step_of(40, heads=4, kv_heads=2)
        step.q[:, :, :-1] = step.q[:, :, torch.randperm(39, generator=torch.Generator().manual_seed(seed))]
        sets.append(kept_after(cache, step))
    assert sets[0] == sets[1]
    changed = step_of(40, heads=4, kv_heads=2)
    changed.q[:, :, -1] = changed.q[:, :, 3]
    assert kept_after(layer(budget=12), changed) != sets[0]


def test_a_wrong_granularity_is_named():
    with pytest.raises(UserError, match=r"method\.granularity=head"):
        load_method("tova", granularity="head")
