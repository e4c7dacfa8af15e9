"""Q-Filters: the direction that queries share by hand, what it keeps, and where its filters come from."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core import artefacts
from methods.core.bind import unbound
from methods.core.capture import capture_steps
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.qfilters import principal, sample_queries, score_keys
from tests.bounds import bound, half_digit, near, run_off
from tests.methods.conftest import kept, run, tiny_llama
from tests.methods.layer import kept_after, step_of
from tests.tiny import ARCHITECTURES, VOCAB, calibrated, tiny_model

X1 = [[2, 1], [3, 1], [2.5, 0.5], [-0.5, 0.2]]
X2 = [[1, 2], [0.5, 2.5], [1.5, 2], [0.2, 1]]
FILTER = torch.tensor([[0.678571, 0.609837]])  # [H, D], the mean of both directions
KEYS = torch.tensor([(1, 0), (-1, -1), (0, 0.5), (2, 1), (0.5, 0.5), (-0.2, -0.1)])


def tokens(n: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def layer_of(name: str, filters: torch.Tensor = FILTER, **knobs):
    """One layer of the method, given its filters [H, D]."""
    spec = SimpleNamespace(name="toy", n_layers=1, n_kv_heads=len(filters), head_dim=filters.shape[1])
    spec.prepared = filters[None]
    return load_method(name, **knobs).caches(spec, None)[0]


def step_with(keys: torch.Tensor, start: int = 0, stage: Stage = Stage.ENDS_PROMPT):
    """A step whose keys, for one row and one KV head, are [T, D]."""
    step = step_of(len(keys), dim=keys.shape[1], start=start, stage=stage)
    step.k = keys[None, None].clone()
    return step


@pytest.mark.parametrize("route", ["eigen", "svd"])
def test_the_direction_of_a_group_is_the_mean_of_its_heads_directions(route):
    found = principal(torch.tensor([X1, X2]), route)
    expected = torch.tensor([[0.952254, 0.305308], [0.404889, 0.914366]])
    # four queries of two numbers: sums of eight products, none larger than ten
    off = bound(torch.float32, 8, size=10.0)
    near(found.direction, expected, half_digit(6) + off)
    projections = torch.tensor(X1) @ found.direction[0]
    near(projections, [2.2098, 3.1621, 2.5333, -0.4151], half_digit(4) + 10 * off)
    assert found.positive.tolist() == [0.75, 1.0]
    near(found.projection[0], projections.mean(), 10 * off)
    mean = found.direction.mean(0)
    near(mean, FILTER[0], half_digit(6) + off)
    near(mean.norm(), 0.912338, half_digit(6) + off)


def test_the_direction_points_to_where_most_queries_are_however_long_the_others_are():
    x = torch.tensor([[[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-9.0, 0.0]]])
    for route in ("eigen", "svd"):
        assert principal(x, route).direction[0, 0] > 0.99
        assert principal(-x, route).direction[0, 0] < -0.99


def test_both_routes_find_the_same_directions_in_a_models_queries(any_heads):
    queries = sample_queries(any_heads, [tokens(90, seed) for seed in (3, 4)], 150, seed=0)
    for x in queries:
        eigen, svd = principal(x, "eigen"), principal(x, "svd")
        assert ((eigen.direction * svd.direction).sum(-1).abs() > 0.99999).all()
        sure = (eigen.positive > 0.55) & (svd.positive > 0.55)
        assert ((eigen.direction * svd.direction).sum(-1)[sure] > 0.99999).all()


def test_capped_keeps_the_newest_and_the_highest_products():
    # short keys would have kept 2 instead of 3
    assert kept_after(layer_of("qfilters_capped", budget=4, window=2), step_with(KEYS)) == [0, 3, 4, 5]


def test_capped_protects_the_newest_half_unless_told_otherwise():
    keys = torch.stack((-torch.arange(12.0), torch.zeros(12)), dim=1)  # the older the better
    along = torch.tensor([[1.0, 0.0]])
    assert kept_after(layer_of("qfilters_capped", filters=along, budget=8), step_with(keys)) == [
        0,
        1,
        2,
        3,
        8,
        9,
        10,
        11,
    ]


def test_capped_protects_half_of_what_the_sinks_leave():
    keys = torch.stack((-torch.arange(12.0), torch.zeros(12)), dim=1)
    layer = layer_of("qfilters_capped", filters=torch.tensor([[1.0, 0.0]]), budget=8, sinks=2)
    assert kept_after(layer, step_with(keys)) == [0, 1, 2, 3, 4, 9, 10, 11]


def test_sinks_window_and_one_slot_more_always_fit():
    for name in ("qfilters", "qfilters_capped"):
        assert load_method(name, budget=0.1, sinks=2, window=3).slots(20) == 6
    keys = torch.zeros(20, 2).index_fill(0, torch.tensor([9]), 5.0)
    assert kept_after(layer_of("qfilters", budget=0.1, sinks=2, window=3), step_with(keys)) == [0, 1, 9, 17, 18, 19]


def test_scores_of_a_half_precision_model_are_float32():
    # 256 + 1 and 256 + 1.0078125, one number in bfloat16
    k = torch.tensor([[256.0, 1.0], [256.0, 1.0078125]], dtype=torch.bfloat16)
    assert score_keys(k[None, None], torch.ones(1, 2))[0, 0].tolist() == [257.0, 257.0078125]


def test_a_filter_is_the_mean_of_the_query_heads_that_share_its_kv_head(gqa):
    rows = [tokens(60, seed) for seed in (3, 4)]
    calibration = load_method("qfilters").calibrate(gqa, rows, seed=0)
    for layer, x in enumerate(sample_queries(gqa, rows, 3000, seed=0)):  # [4, N, D], two KV heads
        each = [principal(x[head : head + 1]).direction[0] for head in range(4)]
        for kv_head, pair in enumerate((each[:2], each[2:])):
            mean = (pair[0] + pair[1]) / 2
            # a direction errs by what the products do over the gap to the next one, a tenth at least
            near(calibration.tensors["filters"][layer, kv_head], mean, bound(torch.float32, 120, size=10.0))


def test_capped_drops_one_token_per_step_and_none_comes_back():
    layer = layer_of("qfilters_capped", budget=4, window=2)
    assert kept_after(layer, step_with(KEYS[:4])) == [0, 1, 2, 3]  # as many as there may be
    assert kept_after(layer, step_with(KEYS[4:5], 4, Stage.DECODE)) == [0, 2, 3, 4]
    assert kept_after(layer, step_with(KEYS[5:6], 5, Stage.DECODE)) == [0, 3, 4, 5]
    best = torch.tensor([[9.0, 9.0]])
    assert kept_after(layer, step_with(best, 6, Stage.DECODE)) == [0, 3, 5, 6]
    assert kept_after(layer, step_with(-best, 7, Stage.DECODE)) == [0, 3, 6, 7]


def test_a_later_turn_in_one_piece_leaves_what_it_leaves_token_by_token():
    one, many = (layer_of("qfilters_capped", budget=5, window=2) for _ in range(2))
    for layer in (one, many):
        kept_after(layer, step_with(KEYS))
        kept_after(layer, step_with(KEYS[:1], 6, Stage.DECODE))
    turn = torch.randn(7, 2, generator=torch.Generator().manual_seed(5))
    left = kept_after(one, step_with(turn, 7, Stage.TURN))
    for i, key in enumerate(turn):
        last = kept_after(many, step_with(key[None], 7 + i, Stage.DECODE))
    assert left == last and len(left) == 5


def test_one_shot_keeps_the_highest_products_and_protects_only_what_it_is_told_to():
    assert kept_after(layer_of("qfilters", budget=4), step_with(KEYS)) == [0, 2, 3, 4]
    assert kept_after(layer_of("qfilters", budget=4, window=1), step_with(KEYS)) == [0, 3, 4, 5]
    assert kept_after(layer_of("qfilters", budget=3, sinks=2), step_with(KEYS)) == [0, 1, 3]
    layer = layer_of("qfilters", budget=2)
    assert kept_after(layer, step_with(KEYS)) == [0, 3]
    assert kept_after(layer, step_with(KEYS[1:2], 6, Stage.DECODE)) == [0, 3, 6]  # appended, whatever it scores
    assert set(layer.store.buffers) == {"k", "v", "pos"}  # scores are forgotten once they have decided


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_at_a_later_prompts_end_what_stayed_is_scored_again(budget):
    keys = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    layer = layer_of("qfilters", budget=budget)
    held = [*kept_after(layer, step_with(keys[:12])), *range(12, 20)]
    best = score_keys(keys[None, None, held], FILTER)[0, 0].topk(min(len(held), int(20 * budget))).indices
    assert kept_after(layer, step_with(keys[12:], 12)) == sorted(held[i] for i in best.tolist())
    assert set(layer.store.buffers) == {"k", "v", "pos"}


def test_of_equal_scores_the_lower_position_stays():
    keys = torch.ones(6, 2)
    assert kept_after(layer_of("qfilters", budget=3), step_with(keys)) == [0, 1, 2]
    layer = layer_of("qfilters_capped", budget=4, window=1)
    assert kept_after(layer, step_with(keys)) == [0, 1, 2, 5]
    assert kept_after(layer, step_with(keys[:1], 6, Stage.DECODE)) == [0, 1, 2, 6]


def test_of_equal_scores_the_lower_position_stays_wherever_it_lies():
    # 0 goes first and 5 takes its place, before 1, 2 and 3; then 4 goes, and a turn brings 6 and 7
    layer = layer_of("qfilters_capped", budget=4, window=1)
    keys = torch.ones(8, 2)
    keys[0] = 0
    kept_after(layer, step_with(keys[:4]))
    assert kept_after(layer, step_with(keys[4:5], 4, Stage.DECODE)) == [1, 2, 3, 4]
    assert kept_after(layer, step_with(keys[5:6], 5, Stage.DECODE)) == [1, 2, 3, 5]
    assert kept_after(layer, step_with(keys[6:], 6, Stage.TURN)) == [1, 2, 3, 7]


def test_only_the_sign_of_a_filters_length_matters_and_no_query_does():
    keys = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    plain = kept_after(layer_of("qfilters", budget=10), step_with(keys))
    assert kept_after(layer_of("qfilters", filters=7 * FILTER, budget=10), step_with(keys)) == plain
    reverse = kept_after(layer_of("qfilters", filters=-FILTER, budget=10), step_with(keys))
    assert sorted(plain + reverse) == list(range(20))
    other = step_with(keys)
    other.q = -3 * other.q.flip(2)
    assert kept_after(layer_of("qfilters", budget=10), other) == plain


def test_capped_holds_the_best_of_all_tokens_that_ever_left_the_window(any_heads):
    ids, new = tokens(40), tokens(25, seed=2)
    method = load_method("qfilters_capped", budget=20, window=6)
    cache = method.cache_for(any_heads)
    filters = cache.spec.prepared
    run(any_heads, cache, ids, new=new)
    # the first layer's keys depend on their own tokens only, so they are those of the whole text
    k = capture_steps(any_heads, torch.cat((ids, new), dim=1))[0].k[0]  # [H, 65, D]
    for head in range(k.shape[0]):
        older = (k[head, :59] @ filters[0, head]).topk(14).indices.tolist()
        assert kept(cache, 0, 0, head) == sorted(older + list(range(59, 65)))


def test_one_shot_equals_a_sort_of_the_prompts_products_for_every_head(any_heads):
    ids = tokens(80)
    for budget in (0.5, 0.25, 0.125):
        cache = load_method("qfilters", budget=budget).cache_for(any_heads)
        run(any_heads, cache, ids)
        steps = capture_steps(any_heads, ids)  # one_shot decides when the prompt has attended in full
        for layer, step in enumerate(steps):
            products = torch.einsum("hnd,hd->hn", step.k[0], cache.spec.prepared[layer])
            for head, row in enumerate(products):
                assert kept(cache, layer, 0, head) == sorted(row.topk(int(80 * budget)).indices.tolist())


def test_filters_are_made_of_the_queries_that_the_model_attends_with(gqa):
    ids = tokens(50)
    with unbound(gqa) as stock, torch.no_grad():
        attention, hidden = stock.model.layers[0].self_attn, stock.model.embed_tokens(ids)
        cos, sin = stock.model.rotary_emb(hidden, torch.arange(50)[None])
        q = attention.q_proj(stock.model.layers[0].input_layernorm(hidden)).view(50, 4, 16).transpose(0, 1)
    a, b = q.chunk(2, dim=-1)
    rotated = q * cos + torch.cat((-b, a), dim=-1) * sin
    first, second = sample_queries(gqa, [ids], 1000, seed=0)
    near(first, rotated, run_off(rotated))
    # a sample: the same rows for all heads of a layer, others in the next layer, in the order of the text
    few = sample_queries(gqa, [ids], 20, seed=0)
    places = [
        [torch.cdist(x, whole).argmin(-1) for x, whole in zip(layer, wholes, strict=True)]
        for layer, wholes in zip(few, (first, second), strict=True)
    ]
    for heads in places:
        assert all(torch.equal(heads[0], head) for head in heads)
        assert len(heads[0].unique()) == 20 and (heads[0].diff() > 0).all()
    assert not torch.equal(places[0][0], places[1][0])
    again, other = (sample_queries(gqa, [ids], 20, seed=seed) for seed in (0, 1))
    assert torch.equal(again[0], few[0]) and not torch.equal(other[0], few[0])


def test_rows_read_apart_are_sampled_as_one_text(gqa):
    pieces = [tokens(30, seed) for seed in (1, 2)]
    together = sample_queries(gqa, pieces, 1000, seed=0)
    apart = [sample_queries(gqa, [piece], 1000, seed=0) for piece in pieces]
    for layer, whole in enumerate(together):
        near(whole, torch.cat([one[layer] for one in apart], dim=1), run_off(whole))
    assert [x.shape[1] for x in sample_queries(gqa, pieces, 25, seed=0)] == [25, 25]


def test_keys_along_the_direction_get_more_attention_than_short_ones_do():
    # queries scatter around one direction; keys have any length and angle
    g = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
    q = 6 * u + torch.randn(400, 32, generator=g)
    k = torch.randn(300, 32, generator=g) - u
    attention = (q @ k.T / 32**0.5).softmax(-1).mean(0)
    products = k @ principal(q[None]).direction[0]
    assert spearman(products, attention) > 0.9
    assert spearman(products, attention) > spearman(-k.norm(dim=-1), attention) + 0.3


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().float() for x in (a, b)]))[0, 1])


def made_for(model, folder, sign: str | None = "high is kept", factor: float = 1.0):
    """Filters that lie in a file of their own; sign: what its card says, None: nothing."""
    calibration = load_method("qfilters").calibrate(model, [tokens(60)], seed=0)
    facts = {**calibration.facts, "sign_convention": sign}
    if sign is None:
        del facts["sign_convention"]
    return artefacts.save(
        "qfilters", "filters", model, {"filters": factor * calibration.tensors["filters"]}, facts, at=folder
    )


def test_filters_stored_with_the_other_sign_keep_the_same_slots(gqa, tmp_path):
    ids, sets = tokens(80), []
    for name, sign, factor in (("plus", "high is kept", 1.0), ("minus", "low is kept", -1.0)):
        path = made_for(gqa, tmp_path / name, sign, factor)
        cache = load_method("qfilters", budget=0.25, filters=str(path)).cache_for(gqa)
        run(gqa, cache, ids)
        sets.append([kept(cache, layer, 0, head) for layer in range(2) for head in range(2)])
    assert sets[0] == sets[1]


def test_filters_that_do_not_say_which_sign_they_have_are_refused(gqa, tmp_path):
    for sign in (None, "up"):
        path = made_for(gqa, tmp_path, sign)
        with pytest.raises(UserError, match="does not say whether high or low is kept"):
            load_method("qfilters", filters=str(path)).cache_for(gqa)


def test_a_model_without_filters_is_told_how_to_make_them():
    with pytest.raises(UserError, match=r"no filters for the model .*python run\.py runner=calibrate method=qfilters"):
        load_method("qfilters").cache_for(tiny_llama(2, 2))


def test_filters_of_another_rope_are_refused(gqa, tmp_path):
    path = made_for(gqa, tmp_path)
    other = tiny_llama(4, 2)
    other.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(UserError, match=r"rope_parameters\.factor is None there, 4\.0 here"):
        load_method("qfilters", filters=str(path)).cache_for(other)


def test_the_card_says_how_sure_each_head_is(gqa):
    calibration = load_method("qfilters").calibrate(gqa, [tokens(60)], seed=0)
    shares = calibration.facts["positive_share"]
    assert len(shares) == 2 and all(len(layer) == 4 and all(0.5 <= share <= 1 for share in layer) for layer in shares)
    doubtful = [f"{i}.{h}" for i, layer in enumerate(shares) for h, share in enumerate(layer) if share < 0.6]
    assert (
        calibration.report[-1].startswith("doubtful") and calibration.report[-1].endswith(", ".join(doubtful))
    ) or not doubtful
    assert calibration.tensors["filters"].shape == (2, 2, 16)
    assert json.dumps(calibration.facts)


def test_too_few_queries_are_refused(gqa):
    with pytest.raises(UserError, match="10 queries for vectors of 16 numbers are too few"):
        load_method("qfilters").calibrate(gqa, [tokens(60)], seed=0, n_rows=10)


def test_skipped_layers_keep_everything_and_the_share_says_so(gqa):
    for name in ("qfilters", "qfilters_capped"):
        cache = load_method(name, budget=0.25, skip=[0]).cache_for(gqa)
        run(gqa, cache, tokens(80), new=tokens(3, seed=2))
        assert kept(cache, 0) == list(range(83)) and len(kept(cache, 1)) == (23 if name == "qfilters" else 20)
        cache.check_budget()
        report = cache.report()
        assert 0.625 <= report.share <= (0.625 * report.full_prompt + report.overhead) / report.full_prompt
    with pytest.raises(UserError, match="has layers 0 to 1"):
        load_method("qfilters", skip=[2]).cache_for(gqa)


def test_filters_are_counted_once_as_the_methods_own(gqa):
    cache = load_method("qfilters", budget=0.5).cache_for(gqa)
    run(gqa, cache, tokens(40))
    assert cache.report().adapter == 2 * 2 * 16 * 4  # layers, KV heads, channels, bytes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_can_be_calibrated_and_compressed(arch, artefact_folder):
    model = calibrated(tiny_model(arch), "qfilters", artefact_folder)
    cache = load_method("qfilters", budget=8).cache_for(model)
    with torch.no_grad():
        model(tokens(30), past_key_values=cache, use_cache=True)
    assert all(len(kept(cache, layer)) == 8 for layer in range(2))


@pytest.mark.parametrize("knobs", [{"window": -1}, {"sinks": -1}, {"budget": 20, "window": 20}, {"skip": [-1]}])
def test_knobs_that_mean_nothing_are_refused_by_name(knobs):
    with pytest.raises(UserError, match=rf"{next(iter(knobs))}={next(iter(knobs.values()))}".replace("[", r"\[")):
        load_method("qfilters", **knobs)


def test_the_shipped_filters_fit_the_shipped_model():
    model = AutoModelForCausalLM.from_pretrained(artefacts.ROOT / "assets" / "reference", dtype=torch.float32)
    filters = load_method("qfilters").prepare(model)
    config = model.config
    assert filters.shape == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    lengths = filters.norm(dim=-1)
    assert (lengths > 0).all() and (lengths <= 1 + bound(torch.float32, config.head_dim)).all()
