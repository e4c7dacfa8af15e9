"""Keyformer against the cases worked by hand and against dense noisy rows in float64."""

import pytest
import torch

from kernels import Stem, backend, uniform
from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.stores.ragged import RaggedStore
from tests.bounds import SHARP, bound, half_digit, near, run_off
from tests.kernels.formula import NOISIEST
from tests.methods.conftest import kept, run
from tests.methods.dense import HeavyHitters, Recorded, check
from tests.methods.layer import Spec, context, filled, kept_after, ranked, scripted, step_of
from tests.tiny import feed, tiny_model


def tokens(n: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def noisy_rows(method, recorded: Recorded, layer: int, sample: int, n_prompt: int):
    """row(h, i, held) for HeavyHitters: the definition, its noise drawn number by number."""

    def row(h: int, i: int, held: list[int]) -> torch.Tensor:
        x = recorded.logits(h, i, held)  # [G, n]
        heads = torch.arange(h * len(x), (h + 1) * len(x))[:, None]
        if method.noise != "none":
            query = [torch.tensor(i)] if method.noise == "fresh" else []
            keys = [torch.tensor(sample), torch.tensor(layer), heads, *query, torch.tensor(held)]
            x = x - (-uniform(method.seed, *keys).double().log()).log()
        t = min(max(0, i - n_prompt + 1), method.new_tokens)
        tau = method.tau_init + t * (method.tau_end - method.tau_init) / method.new_tokens
        return (x / tau).softmax(-1).sum(0)

    return row


def follow(hand: list[HeavyHitters], prompt: int, total: int) -> None:
    for one in hand:
        one.prompt(prompt)
        for i in range(prompt, total):
            one.step(i)


def test_sizes_of_the_paper():
    method = load_method("keyformer", budget=0.6)
    assert method.slots(1920) == method.capacity(1920) == 1152
    store = filled(1200)
    store.track("score")
    scores = ranked(method, store, step_of(1200), context(store, step_of(1200), 1152))
    assert scores.isinf().sum() == 345  # and 807 key tokens


def test_the_released_masks_show_one_slot_less_of_a_number_too():
    method = load_method("keyformer", budget=30, compat="official_mask")
    assert [method.slots(n) for n in (20, 29, 30, 60)] == [20, 29, 29, 29] and method.capacity(20) == 29


def test_the_temperature_rises_by_the_plan_and_then_stays():
    method = load_method("keyformer")
    tau = method.tau(torch.tensor([0, 64, 127, 128, 500]))
    assert tau.tolist() == [1.0, 1.5, 1.9921875, 2.0, 2.0]


@pytest.mark.parametrize(
    ("tau_end", "expected"),
    [
        (1.0, [0.545383, 0.181542, 0.099633, 0.099633, 0.073810]),
        (2.0, [0.357186, 0.206079, 0.152667, 0.152667, 0.131402]),
    ],
)
def test_a_decode_row_worked_by_hand(tau_end, expected, monkeypatch):
    x, zeta = torch.tensor([2.0, 0.0, 1.0, 0.5, -0.5]), torch.tensor([0.3, 1.2, -0.4, 0.1, 0.8])
    cache = load_method("keyformer", budget=50, tau_end=tau_end, new_tokens=1).caches(Spec, None)[0]
    kept_after(cache, scripted([[{}] * 4]))
    monkeypatch.setattr(Stem, "log_uniform", lambda self, key, *work: -(-zeta).exp())
    monkeypatch.setattr(backend, "_chosen", "reference")
    cache.store.track("score").zero_()
    kept_after(cache, scripted([[dict(enumerate(x.softmax(-1).tolist()))]], start=4, stage=Stage.DECODE))
    near(cache.store.track("score")[0, 0], expected, half_digit(6) + bound(torch.float32, 5, 4.0, width=16))


@pytest.mark.parametrize(
    ("compat", "after_prompt", "after_step"),
    [
        (None, [0, 2, 4, 7, 8, 9], [0, 2, 7, 8, 9, 10]),
        ("official_mask", [0, 2, 4, 8, 9], [0, 2, 4, 9, 10]),
    ],
)
def test_hand_worked_selection(compat, after_prompt, after_step):
    method = load_method("keyformer", budget=0.6, recent=0.5, compat=compat)
    rows = [[5, 1, 4, 2, 3, 0.5, 0.4, 6, 0.2, 0.1], [0.1] * (len(after_prompt) + 1)]
    method.rows = lambda *args: torch.tensor(rows.pop(0))[None, None]
    cache = method.caches(Spec, None)[0]
    assert kept_after(cache, step_of(10)) == after_prompt
    assert kept_after(cache, step_of(1, stage=Stage.DECODE, start=10)) == after_step


def test_the_released_masks_lose_every_token_that_leaves_the_window(gqa):
    cache = load_method("keyformer", budget=0.5, compat="official_mask").cache_for(gqa)
    run(gqa, cache, tokens(60))
    keys = [p for p in kept(cache, 1) if p < 51]  # 30 slots, 9 of them recent: one recent token is not seen
    assert len(keys) == 21 and kept(cache, 1) == [*keys, *range(52, 60)]
    for i in range(60, 90):
        with torch.no_grad():
            gqa(tokens(1, seed=i), past_key_values=cache, use_cache=True)
        assert kept(cache, 1) == [*keys, *range(i - 7, i + 1)]


@pytest.mark.parametrize("noise", ["fresh", "per_token", "none"])
@pytest.mark.parametrize("chunks", [None, [13, 30, 17]])
def test_sums_and_sets_are_those_of_dense_rows_in_float64(noise, chunks, any_heads):
    ids, new = tokens(60), tokens(25, seed=2)
    method = load_method("keyformer", budget=0.4, noise=noise, new_tokens=20, seed=11)
    cache = method.cache_for(any_heads, prompt_len=60, samples=[5])
    recorded = [Recorded(cache, index) for index in range(2)]
    run(any_heads, cache, ids, chunks=chunks, new=new)
    for index, record in enumerate(recorded):
        row = noisy_rows(method, record, index, 5, 60)
        hand = [HeavyHitters(row, h, 24, 7) for h in range(len(record.k[0]))]
        follow(hand, 60, 85)
        check(cache.layers[index], "score", hand)


def test_a_prompt_hotter_than_one_is_scored_at_its_temperature(gqa):
    ids = tokens(60)
    for noise in ("fresh", "none"):
        method = load_method("keyformer", budget=0.4, tau_init=1.5, tau_end=3, noise=noise)
        cache = method.cache_for(gqa)
        recorded = Recorded(cache, 1)
        run(gqa, cache, ids, new=tokens(3, seed=2))
        hand = [HeavyHitters(noisy_rows(method, recorded, 1, 0, 60), h, 24, 7) for h in range(2)]
        follow(hand, 60, 63)
        check(cache.layers[1], "score", hand)


@pytest.mark.parametrize("arch", ["gptj", "gpt2", "mpt", "llama", "qwen3", "falcon-mqa"])
def test_the_papers_architectures_and_grouped_queries_follow_the_definition(arch):
    # MPT's ALiBi is part of the logits that are scored
    model, ids = tiny_model(arch), tokens(50)
    method = load_method("keyformer", budget=0.4, new_tokens=10)
    cache = method.cache_for(model)
    recorded = Recorded(cache, 1)
    feed(model, cache, ids, torch.ones_like(ids), [30] + [1] * 20)
    assert (recorded.rules.slopes is not None) == (arch == "mpt")
    row = noisy_rows(method, recorded, 1, 0, 30)
    hand = [HeavyHitters(row, h, 12, 3) for h in range(len(recorded.k[0]))]
    follow(hand, 30, 50)
    check(cache.layers[1], "score", hand)


def test_padded_rows_draw_the_noise_of_their_sample(gqa):
    ids, mask = tokens(60, rows=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :23] = 0
    method = load_method("keyformer", budget=0.4)
    cache = method.cache_for(gqa, samples=[3, 8])
    recorded = Recorded(cache, 1, row=1)
    run(gqa, cache, ids, mask=mask, new=tokens(9, seed=2, rows=2))
    hand = [HeavyHitters(noisy_rows(method, recorded, 1, 8, 37), h, 14, 4) for h in range(2)]
    follow(hand, 37, 46)
    check(cache.layers[1], "score", hand, row=1)


def test_rows_that_change_places_keep_the_noise_of_their_sample(gqa):
    ids, new, order = tokens(40, rows=2), tokens(6, seed=2, rows=2), torch.tensor([1, 0])
    method, scores = load_method("keyformer", budget=60), []
    for late in (True, False):
        first = torch.arange(2) if late else order
        cache = method.cache_for(gqa, samples=(3 + 5 * first).tolist())
        run(gqa, cache, ids[first], new=new[first, :2])
        if late:
            cache.reorder_cache(order)
        with torch.no_grad():
            for i in range(2, 6):
                gqa(new[:, i : i + 1], position_ids=torch.full((2, 1), 40 + i), past_key_values=cache, use_cache=True)
        scores.append(cache.layers[1].inner.store.track("score").clone())
    near(*scores, bound(torch.float32, 128, SHARP + NOISIEST, size=scores[0].max().item(), width=16))


def test_a_later_turn_has_a_temperature_per_token(gqa):
    ids, turn = tokens(40), tokens(7, seed=2)
    method = load_method("keyformer", budget=60, new_tokens=6)
    cache = method.cache_for(gqa)
    recorded = Recorded(cache, 1)
    run(gqa, cache, ids, new=tokens(2, seed=3))
    with torch.no_grad():
        gqa(turn, past_key_values=cache, use_cache=True)
    hand = [HeavyHitters(noisy_rows(method, recorded, 1, 0, 40), h, 60, 18) for h in range(2)]
    follow(hand, 40, 49)
    check(cache.layers[1], "score", hand)


@pytest.mark.parametrize("noise", ["fresh", "none"])
def test_a_turn_scores_heads_that_hold_different_numbers_as_if_each_were_alone(noise):
    # after a turn, four slots of the second head are no token; what they would get must go to the others
    method = load_method("keyformer", noise=noise, new_tokens=6)
    store, step = RaggedStore(), step_of(5, heads=4, kv_heads=2, stage=Stage.TURN, start=20)
    first = step_of(20, kv_heads=2)
    store.append(first.k, first.v, first.pos)
    keep = torch.zeros(1, 2, 20, dtype=torch.bool)
    keep[0, 0, :9], keep[0, 1, 8:13] = True, True
    store.keep(keep, 9)
    store.append(step.k, step.v, step.pos)
    t = step.pos - 20 + 1
    stem = Stem.of(0, step.samples[:, None, None], torch.zeros(1, 1, 1, dtype=torch.long), torch.arange(4)[:, None])
    rows = method.rows(store, step, None, stem if noise == "fresh" else None, t)
    k, slots = store.read()[0].double(), store.pos.long()
    off = bound(torch.float32, 14, SHARP + NOISIEST, size=10.0, width=8)
    for h in range(2):
        expected = torch.zeros(14, dtype=torch.float64)
        for i in range(5):
            seen = (slots[0, h] >= 0) & (slots[0, h] <= 20 + i)
            x = step.q[0, 2 * h : 2 * h + 2, i].double() @ k[0, h, seen].T * step.rules.scale
            if noise == "fresh":
                heads = torch.arange(2 * h, 2 * h + 2)[:, None]
                keys = [torch.tensor(0), torch.tensor(0), heads, torch.tensor(20 + i), slots[0, h, seen]]
                x = x - (-uniform(0, *keys).double().log()).log()
            expected[seen] += (x / method.tau(torch.tensor(i + 1.0))).softmax(-1).sum(0)
        near(rows[0, h], expected, off)


def test_every_query_head_gives_one_per_query(any_heads):
    cache = load_method("keyformer", budget=100).cache_for(any_heads)
    run(any_heads, cache, tokens(60))
    score = cache.layers[1].inner.store.track("score")
    of_all = 60 * 4 // score.shape[1]
    near(score.sum(-1), of_all, bound(torch.float32, 60, SHARP, size=of_all, width=16))


def test_without_noise_at_temperature_one_it_is_h2o_with_the_same_split(any_heads):
    ids, new = tokens(60), tokens(20, seed=2)
    ours = load_method("keyformer", budget=0.5, noise="none", tau_end=1.0, recent=0.5).cache_for(any_heads)
    theirs = load_method("h2o", budget=0.5).cache_for(any_heads)
    a, b = run(any_heads, ours, ids, new=new), run(any_heads, theirs, ids, new=new)
    near(a, b, run_off(b))
    for layer in range(2):
        for head in range(ours.layers[0].inner.store.pos.shape[1]):
            assert kept(ours, layer, 0, head) == kept(theirs, layer, 0, head)


def test_seeds_samples_and_kinds_of_noise_choose_otherwise(gqa):
    ids, sets = tokens(80), []
    for knobs, sample in (({}, 0), ({"seed": 1}, 0), ({}, 1), ({"noise": "per_token"}, 0), ({"noise": "none"}, 0)):
        cache = load_method("keyformer", budget=0.3, **knobs).cache_for(gqa, samples=[sample])
        run(gqa, cache, ids)
        sets.append(tuple(tuple(kept(cache, 1, 0, head)) for head in range(2)))
    assert len(set(sets)) == len(sets)


@pytest.mark.parametrize("arch", ["llama", "mpt"])
def test_a_shared_score_is_the_sum_over_layers_and_keeps_one_set(arch):
    model, ids = tiny_model(arch), tokens(50)
    method = load_method("keyformer", budget=0.4, shared=True)
    cache = method.cache_for(model, prompt_len=30)
    recorded = [Recorded(cache, index) for index in range(2)]
    feed(model, cache, ids, torch.ones_like(ids), [11, 19] + [1] * 20)
    rows = [noisy_rows(method, record, index, 0, 30) for index, record in enumerate(recorded)]
    heads = len(recorded[0].k[0])
    hand = [HeavyHitters(lambda *at: rows[0](*at) + rows[1](*at), h, 12, 3) for h in range(heads)]
    follow(hand, 30, 50)
    for layer in cache.layers:
        check(layer, "score", hand)
    cache.check_budget()


def test_a_shared_score_goes_with_batches_copies_and_beams(gqa):
    ids = tokens(40)
    method = load_method("keyformer", budget=0.4, shared=True)
    beams = gqa.generate(ids, max_new_tokens=8, num_beams=4, do_sample=False, past_key_values=method.cache_for(gqa))
    assert beams.shape[1] <= 48
    batch, alone = method.cache_for(gqa, samples=[3, 4]), method.cache_for(gqa, samples=[4])
    both = run(gqa, batch, torch.cat((tokens(40, seed=5), ids)), new=tokens(9, seed=2).expand(2, -1))
    one = run(gqa, alone, ids, new=tokens(9, seed=2))
    near(both[1], one[0], run_off(one[0]))
    assert kept(batch, 0, 1) == kept(alone, 0) == kept(alone, 1)


def test_a_shared_score_refuses_layers_that_slide():
    model = tiny_model("gemma2")
    with pytest.raises(UserError, match=r"method\.shared=true"):
        run(model, load_method("keyformer", shared=True).cache_for(model), tokens(20))


@pytest.mark.parametrize(
    "knobs",
    [{"recent": 1.2}, {"noise": "loud"}, {"tau_init": 0}, {"tau_end": 0.5}, {"new_tokens": 0}, {"compat": "mine"}],
)
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        load_method("keyformer", **knobs)
