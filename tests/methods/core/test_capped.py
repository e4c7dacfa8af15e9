"""What every method must do that goes on dropping while it decodes; a new one enrols itself."""

from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from methods import load_method, method_names
from methods.adakv import AdaKV
from methods.core.budget import slots
from methods.core.capped import Capped, whole_slots
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.meter import nbytes
from tests.bounds import LOUDEST, SHARP, losses_off, near, run_off
from tests.methods.conftest import kept, run
from tests.methods.layer import context, filled, ranked, step_of
from tests.tiny import equip, feed, padded_prompt
from tests.waiting import NoCopies, no_waiting

NAMES = [name for name in method_names() if isinstance(load_method(name), Capped)]
#: those that hold the same number of slots after every step; the others drop many at once
CONSTANT = [name for name in NAMES if (m := load_method(name, budget=40)).target_size(90) == m.capacity(90)]


def tokens(n: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def held(cache) -> list[int]:
    """Slots of every head, by layer, row and head."""
    return [int(n) for layer in cache.layers for n in (layer.inner.store.pos >= 0).sum(-1).flatten()]


@pytest.mark.parametrize("name", CONSTANT)
def test_the_number_of_slots_stays_the_same_while_decoding(name, any_heads):
    cache = load_method(name, budget=0.3).cache_for(any_heads)
    run(any_heads, cache, tokens(90), new=tokens(1, seed=2))
    before = set(kept(cache, 1))
    for i in range(90, 130):
        with torch.no_grad():
            any_heads(tokens(1, seed=i), past_key_values=cache, use_cache=True)
        assert set(held(cache)) == {27}
        now = set(kept(cache, 1))
        assert now <= before | {i + 1}, "a dropped token never returns"
        before = now


@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_the_ledger_at_the_end_of_the_prompt_and_of_the_generation(name, gqa):
    method, slot = load_method(name, budget=0.3), 16 * 2 * 4  # channels, keys and values, bytes
    cache = method.cache_for(gqa)
    run(gqa, cache, tokens(90))
    cache.check_budget()
    report = cache.report()
    assert report.held_prompt == 2 * 2 * method.slots(90) * slot + report.overhead  # layers, KV heads
    with torch.no_grad():
        for i in range(70):
            gqa(tokens(1, seed=i), past_key_values=cache, use_cache=True)
    report, inner = cache.report(), [layer.inner for layer in cache.layers]
    assert report.held_end + report.padding_end == sum(held(cache)) * slot + sum(layer.overhead() for layer in inner)
    for store in (layer.store for layer in inner):
        # one place more than the cap: the new token attends before another one goes
        assert store.buffers["k"].shape[2] <= method.capacity(90) + 1
        side = sum(b.nbytes for key, b in store.buffers.items() if key not in ("k", "v"))
        assert store.overhead() == side + store.k[:, :, :1].nbytes * 2 * (store.buffers["k"].shape[2] - held(cache)[0])


@pytest.mark.parametrize("name", CONSTANT)
def test_a_decode_step_copies_no_cache_and_never_waits_for_the_device(name, gqa, monkeypatch):
    monkeypatch.setattr("methods.core.capped.check_scores", lambda *_: None)  # only a CPU looks at them
    n, dim = 400, 16
    layer = load_method(name, budget=0.5).cache_for(gqa).layers[0].inner
    steps = [step_of(n, 4, 2, dim)] + [step_of(1, 4, 2, dim, stage=Stage.DECODE, start=n + i) for i in range(6)]
    for i, step in enumerate(steps):
        if i < 3:  # the prompt, and the steps that make room for the one token more
            layer.append(step), layer.attend(step), layer.end_step(step)
            where = {key: b.data_ptr() for key, b in layer.store.buffers.items()}
            continue
        with no_waiting(), NoCopies(limit=layer.store.k.nbytes):
            layer.append(step), layer.attend(step), layer.end_step(step)
        assert where == {key: b.data_ptr() for key, b in layer.store.buffers.items()}
    assert nbytes([layer.store.k]) == 2 * 201 * dim * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_slots_is_what_a_shorter_prompt_grows_to(name, gqa):
    ids, new = tokens(20), tokens(45, seed=2)
    cache, full = load_method(name, budget=50).cache_for(gqa), load_method("full").cache_for(gqa)
    actual, expected = run(gqa, cache, ids, new=new), run(gqa, full, ids, new=new)
    # tokens 0 to 49 attend to all before them; soon after, something is missed
    near(actual[:, :30], expected[:, :30], run_off(expected[:, :30]))
    assert (actual[:, 35:] - expected[:, 35:]).abs().max() > run_off()
    assert max(held(cache)) <= 50
    assert max(layer.inner.store.buffers["k"].shape[2] for layer in cache.layers) <= 20 + 64


@pytest.mark.parametrize("name", NAMES)
def test_as_many_slots_as_tokens_in_all_is_the_full_cache(name, any_heads):
    ids, new = tokens(60), tokens(20, seed=2)
    cache = load_method(name, budget=81).cache_for(any_heads)
    expected = run(any_heads, load_method("full").cache_for(any_heads), ids, new=new)
    near(run(any_heads, cache, ids, new=new), expected, run_off(expected))
    assert set(held(cache)) == {80}


@pytest.mark.parametrize("name", CONSTANT)
def test_as_many_slots_as_the_prompt_leaves_the_prompt_whole_and_then_drops_a_token_per_step(name, gqa):
    ids, new = tokens(60), tokens(3, seed=2)
    cache = load_method(name, budget=60).cache_for(gqa)
    run(gqa, cache, ids)
    assert kept(cache, 1) == list(range(60))
    cache = load_method(name, budget=60).cache_for(gqa)
    run(gqa, cache, ids, new=new)
    assert set(held(cache)) == {60}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.4, 45])
def test_rows_of_a_padded_batch_go_on_as_if_they_were_alone(name, budget, gqa):
    # at 45 slots the shortest row fills up long after the longest
    lengths, new = [60, 33, 48], tokens(18, rows=3, seed=2)
    ids = tokens(60, rows=3)
    mask = torch.tensor([[0] * (60 - n) + [1] * n for n in lengths])
    method = load_method(name, budget=budget)
    batch = method.cache_for(gqa, samples=[7, 8, 9])
    actual = run(gqa, batch, ids, new=new, mask=mask)
    for row, n in enumerate(lengths):
        alone = method.cache_for(gqa, samples=[7 + row])
        expected = run(gqa, alone, ids[row : row + 1, 60 - n :], new=new[row : row + 1])
        for layer, head in [(0, 0), (1, 1)]:
            assert kept(batch, layer, row, head) == kept(alone, layer, 0, head)
        near(actual[row], expected[0], run_off(expected[0]))


@pytest.mark.parametrize("name", NAMES)
def test_later_turns_are_read_whole_and_then_cut_to_the_cap(name, gqa):
    method = load_method(name, budget=0.4)
    cache, lists = method.cache_for(gqa), [50, 13, 1, 1, 9, 1]
    at = 0
    for n in lists:
        with torch.no_grad():
            pos = torch.arange(at, at + n)[None]
            gqa(tokens(n, seed=at), position_ids=pos, past_key_values=cache, use_cache=True)
        at += n
        assert max(held(cache)) <= method.capacity(50)
        assert len(kept(cache, 1)) == len(set(kept(cache, 1)))
    assert cache.get_seq_length() == at
    # the rows of a turn may be padded, and each goes on from its own tokens
    turn, mask = tokens(6, rows=2, seed=5), torch.ones(2, 56, dtype=torch.long)
    mask[1, 50:53] = 0
    both = method.cache_for(gqa, samples=[3, 4])
    ids = tokens(50, rows=2)
    pos = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for a, b in ((0, 50), (50, 56)):
            new = torch.cat((ids, turn), 1)[:, a:b]
            gqa(new, attention_mask=mask[:, :b], position_ids=pos[:, a:b], past_key_values=both, use_cache=True)
        alone = method.cache_for(gqa, samples=[4])
        gqa(ids[1:], past_key_values=alone, use_cache=True)
        gqa(turn[1:, 3:], past_key_values=alone, use_cache=True)
    assert kept(both, 1, 1) == kept(alone, 1)


@pytest.mark.parametrize("name", NAMES)
def test_four_beams_go_on_from_the_rows_they_were_moved_to(name, gqa):
    # each beam is followed by hand with the tokens that beam search gave it
    ids = tokens(40)
    method = load_method(name, budget=0.4, **({"noise": "none"} if name == "keyformer" else {}))
    out = gqa.generate(
        ids, max_new_tokens=12, num_beams=4, do_sample=False, num_return_sequences=4, return_dict_in_generate=True,
        output_scores=True, past_key_values=method.cache_for(gqa),
    )  # fmt: skip
    scores = gqa.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    alone = run(gqa, method.cache_for(gqa), ids.expand(4, -1), new=out.sequences[:, 40:])
    expected = alone.log_softmax(-1)[:, :12].gather(2, out.sequences[:, 40:, None])[..., 0]
    reached = torch.isfinite(scores) & (scores != 0)
    assert reached[:, :12].sum() > 40
    # scores accumulate along the beam, transition scores are one token's each
    near(scores[reached], expected[reached], losses_off(1, SHARP, LOUDEST))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_change_places_take_all_their_state_with_them(name, gqa):
    method, ids, new = load_method(name, budget=0.4), tokens(50, rows=3), tokens(20, rows=3, seed=2)
    rows = torch.tensor([2, 2, 0])
    cache = method.cache_for(gqa, samples=[5, 6, 7])
    run(gqa, cache, ids, new=new[:, :8])
    cache.reorder_cache(rows)
    straight = method.cache_for(gqa, samples=[7, 7, 5])
    run(gqa, straight, ids[rows], new=new[rows, :8])
    with torch.no_grad():
        for i in range(8, 20):
            pos = torch.full((3, 1), 50 + i)
            a, b = (
                gqa(new[:, i : i + 1], position_ids=pos, past_key_values=c, use_cache=True).logits
                for c in (cache, straight)
            )
            near(a, b, run_off(b))
    assert all(kept(cache, 1, r, h) == kept(straight, 1, r, h) for r in range(3) for h in range(2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gpt2", "gptj", "mpt"])
def test_sliding_layers_and_other_architectures_keep_what_the_next_token_sees(name, arch, equipped):
    model = equipped(arch)
    knobs = {"recent": 2} if name == "scissorhands" else {}
    lengths = [40, 31]
    ids, mask = padded_prompt(lengths)
    ids = torch.cat((ids, tokens(25, rows=2)), dim=1)
    mask = torch.cat((mask, torch.ones(2, 25, dtype=torch.long)), dim=1)
    method = load_method(name, budget=0.5, **knobs)
    cache = method.cache_for(model)
    actual = feed(model, cache, ids, mask, [40] + [1] * 20 + [5])
    assert actual.isfinite().all()
    for layer in cache.layers:
        window = 12 if arch == "mistral" or (arch == "gemma2" and layer.index == 0) else None
        n = int((layer.inner.store.pos >= 0).sum(-1).max())
        assert n <= method.capacity(40 if window is None else window - 1)
    parts = feed(model, method.cache_for(model, prompt_len=40), ids, mask, [13, 27] + [1] * 20 + [5])
    near(actual, parts, run_off(parts))


def test_in_a_sliding_layer_what_no_query_sees_goes_first(artefact_folder):
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=16)  # fmt: skip
    model = equip(MistralForCausalLM(config).eval(), artefact_folder)
    for name in NAMES:
        cache = load_method(name, budget=100).cache_for(model)
        run(model, cache, tokens(40), new=tokens(60, seed=3))
        assert min(kept(cache)) >= 100 - 15
        assert cache.layers[0].inner.store.buffers["k"].shape[2] <= 16


@pytest.mark.parametrize("name", NAMES)
def test_dropping_after_every_chunk_changes_the_prompt_and_keeps_to_the_cap(name, gqa):
    method = load_method(name, budget=0.4, evict="per_chunk")
    assert method.changes_prompt and not load_method(name).changes_prompt
    ids, mask = tokens(60, rows=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :25] = 0
    cache, counts = method.cache_for(gqa, prompt_len=60, samples=[3, 4]), []
    layer = cache.layers[1].inner
    end_step = layer.end_step
    layer.end_step = lambda step: (end_step(step), counts.append((layer.store.pos >= 0).sum(-1).amax(-1).tolist()))
    out = run(gqa, cache, ids, chunks=[10] * 6, mask=mask)
    assert all(a <= method.capacity(60) and b <= method.capacity(35) for a, b in counts)
    alone = method.cache_for(gqa, prompt_len=35, samples=[4])
    near(run(gqa, alone, ids[1:, 25:], chunks=[5, 10, 10, 10])[0], out[1], run_off(out[1]))
    assert kept(alone, 1) == kept(cache, 1, 1)
    whole = run(gqa, load_method(name, budget=0.4).cache_for(gqa), ids[:1])
    assert (out[0] - whole[0]).abs().max() > run_off()
    with pytest.raises(UserError, match=r"method\.evict=never"):
        load_method(name, evict="never")


def test_heads_of_different_numbers_take_a_share():
    apart = replace(load_method("h2o", budget=0.3), allocator=AdaKV())
    with pytest.raises(UserError, match=r"h2o: budget=40 with method\.allocator=AdaKV.*give a share"):
        replace(apart, budget=40)


def test_a_share_of_the_slots_is_cut_as_a_budget_is_at_every_size():
    # 0.53 * 100 is below 53 in float32, where a millionth more changes nothing
    sizes = torch.arange(1, 4001)
    for percent in range(101):
        exact = sizes * percent // 100
        assert torch.equal(whole_slots(percent / 100, sizes), exact)
        assert all(slots(percent / 100, n) == exact[n - 1] for n in (100, 340, 4000) if percent)


@pytest.mark.parametrize(
    ("name", "knobs", "size", "newest"),
    [("h2o", {"heavy": 0.53}, 100, 47), ("keyformer", {"recent": 0.65}, 180, 117)],
)
def test_the_newest_slots_are_an_exact_share_of_the_slots(name, knobs, size, newest):
    method, store = load_method(name, **knobs), filled(200)
    scores = ranked(method, store, step_of(200), context(store, step_of(200), size))
    assert scores.isinf().sum() == newest
