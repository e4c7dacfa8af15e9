"""LoCoCo against cases worked by hand, the release's lengths, and what training has to achieve."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods import load_method
from methods.core import artefacts
from methods.core.contract import ModelSpec, Stage
from methods.core.errors import UserError
from methods.lococo import Compressor, Compressors, LoCoCo, LoCoCoCache, Slots, compress
from tests.bounds import MILD, SHARP, bound, near, run_off
from tests.methods.conftest import run, tiny_llama
from tests.methods.layer import step_of

PROMPT = 90


class Untrained(LoCoCo):
    """LoCoCo with the weights that training begins with, the same at every call."""

    def prepare(self, model):
        torch.manual_seed(0)
        return self.new_compressors(model).to(next(model.parameters()).dtype).requires_grad_(False)


def tokens(n: int = PROMPT, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def slots_of(n: int, width: int = 4, rows: int = 2, heads: int = 3) -> Slots:
    g = torch.Generator().manual_seed(n)
    k, v = (torch.randn(rows, heads, n, width, generator=g) for _ in range(2))
    pos = torch.arange(n, dtype=torch.int32).expand(rows, heads, n)
    return Slots(k, v, pos, torch.rand(rows, heads, n, generator=g))


def compressor(method: LoCoCo, width: int = 8, zero: bool = False) -> Compressor:
    torch.manual_seed(0)
    compressor = Compressor(method, width).requires_grad_(False)
    if zero:
        for conv in compressor.convs:
            conv.weight.zero_()
            conv.bias.zero_()
    return compressor


def lengths(cache: LoCoCoCache) -> list[int]:
    return [len(memory.store) for memory in cache.memories]


def a_layer(method: LoCoCo, net: Compressor | None = None, prompt_len: int | None = None) -> LoCoCoCache:
    spec = ModelSpec(
        "x", 1, 1, 1, 8, 4096, torch.float32, torch.device("cpu"), [None], prepared=net and Compressors([net])
    )
    return method.caches(spec, prompt_len)[0]


def turn(layer: LoCoCoCache, n: int, stage: Stage, start: int) -> torch.Tensor:
    step = step_of(n, stage=stage, start=start)
    layer.append(step)
    out = layer.attend(step)
    layer.end_step(step)
    return out


def test_hand_worked_compression_of_six_slots_into_four():
    method = LoCoCo(budget=4, normalizer_init=0.5)
    k = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
    a = torch.tensor([[[0.9, 0.1, 0.4, 0.8, 0.2, 0.3]]])
    held = Slots(k, 10 * k, torch.arange(6, dtype=torch.int32).view(1, 1, 6), a)
    compressed = compress(held, method, compressor(method, width=2, zero=True))
    # raw: 0 and 3; of 1, 2, 4, 5 the next heaviest are 2 and 5: weights (1, 5, 1, 1) / 8 and (1, 1, 1, 5) / 8
    near(compressed.k.flatten(), [1.0, 4.0, 3.5, 5.0], bound(torch.float32, 6, size=6.0))
    near(compressed.v.flatten(), [10.0, 40.0, 35.0, 50.0], bound(torch.float32, 6, size=60.0))
    assert compressed.pos.flatten().tolist() == [0, 3, 2, 5]


def test_accumulated_scores_are_mixed_as_their_slots_are():
    method = LoCoCo(budget=4, normalizer_init=0.5, accumulate_scores=True)
    k = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
    a = torch.tensor([[[0.9, 0.1, 0.4, 0.8, 0.2, 0.3]]])
    held = Slots(k, 10 * k, torch.arange(6, dtype=torch.int32).view(1, 1, 6), a)
    compressed = compress(held, method, compressor(method, width=2, zero=True))
    # the mean of 1, 2, 4 and 5 is 1 / 4, and so is half of every fused score
    near(compressed.mass.flatten(), [0.9, 0.8, 0.325, 0.275], bound(torch.float32, 6))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_raw_slots_are_the_originals_and_fused_ones_lie_in_the_hull_of_the_rest(eta):
    method, held = LoCoCo(budget=12), slots_of(40)
    net = compressor(method)
    net.eta.fill_(eta)
    compressed = compress(held, method, net)
    assert compressed.k.shape == (2, 3, 12, 4)
    for row in range(2):
        for head in range(3):
            best = held.mass[row, head].topk(6).indices.sort().values
            rest = [i for i in range(40) if i not in best.tolist()]
            for new, old in ((compressed.k, held.k), (compressed.v, held.v)):
                assert torch.equal(new[row, head, :6], old[row, head, best])
                low, high = old[row, head, rest].amin(0), old[row, head, rest].amax(0)
                fused = new[row, head, 6:]
                off = bound(torch.float32, 40, size=old.abs().max().item())
                assert (fused >= low - off).all() and (fused <= high + off).all()


def test_the_weights_of_a_fused_slot_sum_to_one():
    method, held = LoCoCo(budget=12), slots_of(40)
    weights = compressor(method)(held.k, held.v)
    assert weights.shape == (2, 3, 6, 40)
    near(weights.sum(-1), 1.0, bound(torch.float32, 40))
    # what every slot says alike, each fused slot says too: R and the convolution's rows both sum to 1
    held.v.fill_(7.0)
    near(compress(held, method, compressor(method)).v, 7.0, bound(torch.float32, 40, size=7.0))


def test_a_convolution_of_zeros_weighs_all_slots_alike():
    method, held = LoCoCo(budget=12), slots_of(40)
    weights = compressor(method, zero=True)(held.k, held.v)
    near(weights, 1 / 40, bound(torch.float32, 40, size=1 / 40))


def test_a_closed_gate_keeps_what_attention_ranks_highest():
    held = slots_of(40)
    for method in (LoCoCo(budget=12, eta=0.0), LoCoCo(budget=12)):
        net = compressor(method)
        net.eta.zero_()
        compressed = compress(held, method, None if method.eta == 0 else net)
        best = held.mass.topk(12, dim=-1).indices
        order = compressed.pos.long().sort(-1)
        assert torch.equal(order.values, best.sort(-1).values)
        by_position = compressed.k.gather(2, order.indices[..., None].expand(-1, -1, -1, 4))
        assert torch.equal(by_position, held.k.gather(2, order.values[..., None].expand(-1, -1, -1, 4)))


def test_at_equal_attention_the_older_slots_stay():
    held = slots_of(20)
    held.mass.fill_(1.0)
    compressed = compress(held, LoCoCo(budget=8, eta=0.0), None)
    assert compressed.pos[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_chunks_scores_are_those_of_its_own_queries(accumulate):
    # the second chunk is compressed before the third, whose eight queries then give a mass of one each
    layer = a_layer(LoCoCo(budget=8, eta=0.0, buffer=0, lazy_end=True, accumulate_scores=accumulate))
    turn(layer, 24, Stage.ENDS_PROMPT, 0)
    mass = layer.memories[0].store.track("mass")
    assert mass.shape == (1, 1, 16)
    if accumulate:
        assert mass.sum() > 8.5
    else:
        near(mass.sum(), 8.0, bound(torch.float32, 24, MILD, size=8.0, width=16))


@pytest.mark.parametrize(("slots", "weights"), [(128, 344_129), (512, 1_376_513)])
def test_a_layers_weights_are_as_many_as_the_release_has(slots, weights):
    # 128 channels of keys and of values, 21 wide; biases and one gate
    untrained = Compressor(LoCoCo(budget=slots), 256)
    assert sum(parameter.numel() for parameter in untrained.parameters()) == weights


def test_forced_recent_slots_stay_raw_and_in_their_order():
    held = slots_of(20)
    compressed = compress(held, LoCoCo(budget=8, eta=0.0, hh_keep_rate=0.75, local_len=4), None)
    raw = compressed.pos[0, 0, :6].tolist()
    assert raw[-4:] == [16, 17, 18, 19]
    assert raw[:2] == sorted(held.mass[0, 0, :16].topk(2).indices.tolist())


def test_the_papers_form_fuses_every_slot():
    method, held = LoCoCo(budget=12, paper_form=True), slots_of(40)
    assert (method.raw, method.fused) == (0, 12)
    net = compressor(method)
    compressed = compress(held, method, net)
    weights = net(held.k, held.v)
    near(compressed.k, weights @ held.k, 2 * bound(torch.float32, 40, size=held.k.abs().max().item()))


def test_the_convolution_looks_at_neighbours_in_the_order_of_the_cache():
    method, held = LoCoCo(budget=12, kernel_size=3), slots_of(40)
    net = compressor(method)
    x = torch.cat((held.k, held.v), dim=-1)[1, 2]  # [40, 8]
    padded = F.pad(x, (0, 0, 1, 1))
    by_hand = torch.stack(
        [sum(net.convs[0].weight[:, :, j] @ padded[i + j] for j in range(3)) + net.convs[0].bias for i in range(40)]
    )
    logits = by_hand.T.relu()
    off = 2 * bound(torch.float32, 40, logits.max().item(), width=3 * 8)
    near(net(held.k, held.v)[1, 2], logits.softmax(-1), off)


def test_lengths_follow_the_release_chunk_by_chunk_and_while_decoding():
    method = LoCoCo(budget=512, eta=0.0, lazy_end=True)
    layer, spans = a_layer(method, prompt_len=4096), []
    for i in range(8):
        stage = Stage.ENDS_PROMPT if i == 7 else Stage.MID_PROMPT
        turn(layer, 512, stage, 512 * i)
        spans += lengths(layer)
    assert spans == [512] + [1024] * 7
    grown = []
    for i in range(19):
        turn(layer, 1, Stage.DECODE, 4096 + i)
        grown += lengths(layer)
    assert grown == [*range(513, 530), 513, 514]


def test_compressing_when_the_prompt_ends_gives_the_same_outputs_and_frees_the_chunk():
    outs, held = [], []
    for lazy in (False, True):
        layer = a_layer(LoCoCo(budget=32, eta=0.0, lazy_end=lazy))
        turn(layer, 128, Stage.ENDS_PROMPT, 0)
        held += lengths(layer)
        outs.append(torch.cat([turn(layer, 1, Stage.DECODE, 128 + i) for i in range(20)], dim=2))
    assert held == [32, 64]
    assert torch.equal(*outs)


@pytest.mark.parametrize("n", [30, 92])
def test_a_text_that_fits_is_read_as_by_the_full_cache(n, gqa):
    ids, new = tokens(n), tokens(92 - n, seed=2) if n < 92 else None
    expected = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    assert torch.equal(run(gqa, Untrained(budget=76).cache_for(gqa), ids, new=new), expected)
    longer = run(gqa, Untrained(budget=76, block_size=20).cache_for(gqa), tokens(200), new=new)
    in_full = run(gqa, load_method("full").cache_for(gqa), tokens(200))
    assert (longer[:, :1] - in_full).abs().max() > run_off(in_full)


def test_the_raw_half_is_chosen_by_the_last_chunk_alone_unless_scores_accumulate():
    ids = tokens(96)
    gqa = tiny_llama(4, 2)
    attended = {}
    for accumulate in (False, True):
        method = LoCoCo(budget=32, buffer=0, eta=0.0, accumulate_scores=accumulate)
        cache = method.cache_for(gqa, prompt_len=96)
        run(gqa, cache, ids[:, :64], chunks=[32, 32])
        store = cache.layers[0].inner.memories[0].store
        attended[accumulate] = store.track("mass")[0].clone()
        # 4 query heads of 2 KV heads: each query spends 1 per head
        queries = 64 if accumulate else 32
        off = bound(torch.float32, 96, SHARP, size=2.0 * queries, width=16)
        near(attended[accumulate].sum(-1), 2.0 * queries, off)
    assert (attended[True] >= attended[False] - off).all()


@pytest.mark.parametrize("knobs", [{"block_size": 16}, {"block_size": 7}, {"accumulate_scores": True}])
@pytest.mark.parametrize("pieces", [[30, 30, 30], [1, 50, 39], [89, 1], [1] * 90])
def test_the_method_cuts_its_own_chunks_out_of_whatever_arrives(pieces, knobs, gqa):
    ids, new = tokens(), tokens(40, seed=2)
    method = Untrained(budget=24, **knobs)
    whole, parts = method.cache_for(gqa), method.cache_for(gqa, prompt_len=PROMPT)
    expected, actual = run(gqa, whole, ids, new=new), run(gqa, parts, ids, chunks=pieces, new=new)
    assert torch.equal(whole.layers[1].inner.pos, parts.layers[1].inner.pos)
    near(actual, expected, run_off(expected))


def test_rows_of_different_lengths_equal_themselves_alone(any_heads):
    real, new = [90, 61, 12], tokens(30, rows=3, seed=2)
    ids = tokens(rows=3)
    mask = torch.tensor([[0] * (PROMPT - n) + [1] * n for n in real])
    method = Untrained(budget=24, block_size=16)
    batch = run(any_heads, method.cache_for(any_heads), ids, new=new, mask=mask)
    for row, n in enumerate(real):
        alone = run(any_heads, method.cache_for(any_heads), ids[row : row + 1, PROMPT - n :], new=new[row : row + 1])
        near(batch[row], alone[0], run_off(alone[0]))


def test_rows_that_change_places_within_a_chunk_end_it_where_it_began():
    order, outs, held = [1, 0], [], []
    for early in (True, False):
        layer = a_layer(LoCoCo(budget=8, block_size=8, buffer=0, eta=0.0), prompt_len=40)
        first, second = (
            step_of(20, rows=2, stage=s, start=at) for s, at in ((Stage.MID_PROMPT, 0), (Stage.ENDS_PROMPT, 20))
        )
        first.pos = torch.stack((F.pad(first.pos[0, :17], (3, 0), value=-1), first.pos[1]))  # three columns of padding
        first.padded, second.pos = True, second.pos - torch.tensor([[0], [3]])
        if early:
            first = replace(first, **{name: getattr(first, name)[order] for name in ("q", "k", "v", "pos")})
        layer.append(first)
        layer.attend(first)
        layer.end_step(first)
        if not early:
            layer.reorder(torch.tensor(order))
        layer.append(second)
        outs.append(layer.attend(second))
        layer.end_step(second)
        held.append(layer.pos)
    assert torch.equal(*outs) and torch.equal(*held)


def test_rows_of_one_length_equal_themselves_alone(any_heads):
    ids, new = tokens(rows=3), tokens(30, rows=3, seed=2)
    method = Untrained(budget=24, block_size=16)
    batch = run(any_heads, method.cache_for(any_heads), ids, new=new)
    for row in range(3):
        alone = run(any_heads, method.cache_for(any_heads), ids[row : row + 1], new=new[row : row + 1])
        near(batch[row], alone[0], run_off(alone[0]))


def test_pieces_of_a_padded_batch_and_a_padded_later_turn(gqa):
    ids, question = tokens(rows=2), tokens(10, rows=2, seed=3)
    mask = torch.tensor([[0] * 50 + [1] * 40, [1] * 90])
    asked = torch.tensor([[1] * 10, [0] * 6 + [1] * 4])
    method = Untrained(budget=24, block_size=16)
    cache = method.cache_for(gqa, prompt_len=PROMPT)
    run(gqa, cache, ids, chunks=[30, 60], mask=mask)  # the first piece of the first row is padding only
    seen = torch.cat((mask, asked), dim=1)
    pos = (seen.cumsum(-1) - 1).clamp_min(0)[:, PROMPT:]
    with torch.no_grad():
        both = gqa(question, attention_mask=seen, position_ids=pos, past_key_values=cache, use_cache=True).logits
        for row, (n, m) in enumerate([(40, 10), (90, 4)]):
            alone = method.cache_for(gqa)
            run(gqa, alone, ids[row : row + 1, -n:])
            pos = torch.arange(n, n + m)[None]
            out = gqa(question[row : row + 1, -m:], position_ids=pos, past_key_values=alone, use_cache=True).logits
            near(both[row, -1], out[0, -1], run_off(out[0, -1]))


def test_a_later_turn_begins_a_chunk_and_compresses_first(gqa):
    method = Untrained(budget=24, block_size=16, lazy_end=True)
    cache = method.cache_for(gqa)
    run(gqa, cache, tokens())  # 24 after the last compression but one, 16 and 10 more
    layer = cache.layers[0].inner
    before = lengths(layer)[0]
    with torch.no_grad():
        gqa(tokens(40, seed=3), past_key_values=cache, use_cache=True)
    assert before > 24
    assert lengths(layer) == [24 + 16 + 8]  # 40 more tokens: chunks of 16, 16, 8; 24 + 16 is not above the limit
    assert layer.pos.max() == PROMPT + 39


@pytest.mark.parametrize("padded", [False, True])
def test_beams_take_their_memory_with_them(padded, gqa):
    ids, new = tokens(rows=2), tokens(25, rows=2, seed=2)
    mask = torch.tensor([[0] * 20 * padded + [1] * (PROMPT - 20 * padded), [1] * PROMPT])
    method = Untrained(budget=24, block_size=16)
    straight, swapped = method.cache_for(gqa), method.cache_for(gqa)
    expected = run(gqa, straight, ids, mask=mask, new=new)
    run(gqa, swapped, ids, mask=mask)
    swapped.reorder_cache(torch.tensor([1, 1]))
    out = []
    with torch.no_grad():
        for i in range(25):
            step, pos = new[1:, i : i + 1].expand(2, 1), torch.full((2, 1), PROMPT + i)
            out.append(gqa(step, position_ids=pos, past_key_values=swapped, use_cache=True).logits)
    actual = torch.cat(out, dim=1)
    near(actual[0], expected[1, 1:], run_off(expected[1, 1:]))
    assert torch.equal(actual[0], actual[1])


def test_a_copy_goes_on_by_itself(gqa):
    method = Untrained(budget=24)
    cache = method.cache_for(gqa)
    run(gqa, cache, tokens())
    twin, new = copy.deepcopy(cache), tokens(30, seed=2)
    with torch.no_grad():
        pos = torch.arange(PROMPT, PROMPT + 30)[None]
        a, b = (gqa(new, position_ids=pos, past_key_values=one, use_cache=True).logits for one in (cache, twin))
    assert torch.equal(a, b)


@pytest.mark.parametrize("lazy", [False, True])
def test_bytes_are_those_of_the_slots_and_the_weights(lazy, any_heads):
    method = Untrained(budget=24, block_size=16, lazy_end=lazy)
    cache = method.cache_for(any_heads)
    run(any_heads, cache, tokens(80))
    cache.check_budget()
    report = cache.report()
    H = any_heads.config.num_key_value_heads
    slot = 2 * 2 * H * 16 * 4  # two layers, keys and values, 16 channels of 4 bytes
    assert report.full_prompt == 80 * slot
    assert report.asked == 24 * slot
    places = 24 + 2 * 16 if lazy else 24  # lazily, two chunks wait
    side = 2 * H * 8  # a position and a score per place
    assert report.held_prompt == places * (slot + side)
    # per layer: Mc * 2 d * k weights, Mc biases, the gate
    assert report.adapter == 2 * (12 * 32 * 21 + 12 + 1) * 4


def test_bytes_above_the_documented_ones_are_a_miss(gqa):
    class Hoarder(Untrained):
        @property
        def max_slots(self) -> int:
            return 60

    cache = Hoarder(budget=24, block_size=16).cache_for(gqa)
    run(gqa, cache, tokens(58))
    with pytest.raises(RuntimeError, match="bytes are held"):
        cache.check_budget()


def test_while_decoding_a_layer_never_holds_more_than_its_slots_and_the_buffer(gqa):
    cache = Untrained(budget=24).cache_for(gqa)
    run(gqa, cache, tokens(), new=tokens(60, seed=2))
    report = cache.report()
    slot = 2 * 2 * 2 * 16 * 4
    place = slot + 2 * 2 * 8
    assert 24 * place <= report.held_end <= report.held_end + report.padding_end <= (24 + 17) * place
    assert report.peak_decode <= (24 + 17) * place


def test_a_published_length_fits_into_its_slots(gqa):
    cache = Untrained(budget=128).cache_for(gqa)
    out = run(gqa, cache, tokens(3482), new=tokens(3, seed=2))
    assert out.isfinite().all()
    report = cache.report()
    assert report.share == 128 * (1 + 8 / 128) / 3482
    assert lengths(cache.layers[1].inner) == [131]


def test_deeper_compressors_have_a_file_of_their_own():
    names = [LoCoCo(budget=24, n_convlayer=depth, expand=3).artefact_name for depth in (1, 2)]
    assert names == ["m24-c24-k21-r0.5", "m24-c24-k21-r0.5-d2x3"]


def test_a_share_is_of_the_stated_length_and_even():
    assert LoCoCo(budget=0.125).slots == 128
    assert LoCoCo(budget=0.1, length=1000).slots == 100
    assert LoCoCo(budget=0.1, length=90).slots == 8
    assert (LoCoCo(budget=100, hh_keep_rate=0.75).raw, LoCoCo(budget=100).chunk) == (75, 100)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"budget": 33}, "budget=33"),
        ({"budget": 0.001}, "budget=0.001"),
        ({"budget": 8, "kernel_size": 4}, "method.kernel_size=4"),
        ({"budget": 8, "hh_keep_rate": 1.0}, "method.hh_keep_rate=1.0"),
        ({"budget": 8, "local_len": 4}, "method.local_len=4"),
        ({"budget": 8, "buffer": -1}, "method.buffer=-1"),
        ({"budget": 8, "block_size": 0}, "method.block_size=0"),
        ({"budget": 8, "hidden_act": "tanh"}, "method.hidden_act=tanh"),
        ({"budget": 8, "normalizer_init": 1.5}, "method.normalizer_init=1.5"),
    ],
)
def test_knobs_that_cannot_work_are_refused_by_name(knobs, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        load_method("lococo", **knobs)


def test_a_missing_compressor_names_the_command_that_trains_it(gqa):
    with pytest.raises(UserError, match=r"runner=train budget=50 method=lococo"):
        load_method("lococo", budget=50).cache_for(gqa)


def test_trained_weights_are_found_by_model_slots_and_chunk(gqa, tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "PLACES", [tmp_path])
    method = load_method("lococo", budget=24, block_size=16)
    nets = method.new_compressors(gqa)
    path = artefacts.save("lococo", method.artefact_name, gqa, nets.state_dict(), {"hidden_act": "relu"})
    assert path.name == "m24-c16-k21-r0.5.safetensors"
    ids = tokens()

    class These(LoCoCo):
        def prepare(self, model):
            return nets

    expected = run(gqa, These(budget=24, block_size=16).cache_for(gqa), ids)
    assert torch.equal(run(gqa, method.cache_for(gqa), ids), expected)
    for other in ({"budget": 26, "block_size": 16}, {"budget": 24}, {"budget": 24, "block_size": 16, "kernel_size": 3}):
        with pytest.raises(UserError, match="make it with"):
            load_method("lococo", **other).cache_for(gqa)
    with pytest.raises(UserError, match="hidden_act=relu"):
        load_method("lococo", budget=24, block_size=16, hidden_act="gelu").cache_for(gqa)
    with pytest.raises(UserError, match="has the shape"):
        load_method("lococo", budget=26, artefact=str(path)).cache_for(gqa)


def test_newest_slots_stay_raw_as_in_training_unless_told_otherwise(gqa, tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "PLACES", [tmp_path])
    trained = load_method("lococo", budget=24, local_len=6)
    nets = trained.new_compressors(gqa)
    assert nets.local_len == 6
    artefacts.save("lococo", trained.artefact_name, gqa, nets.state_dict(), {"hidden_act": "relu", "local_len": 6})
    ids = tokens()
    as_trained, without, dropping = (
        run(gqa, load_method("lococo", budget=24, **knobs).cache_for(gqa), ids)
        for knobs in ({}, {"local_len": 0}, {"eta": 0.0})
    )
    assert torch.equal(as_trained, run(gqa, trained.cache_for(gqa), ids))
    assert not torch.equal(as_trained, without)
    assert torch.equal(dropping, run(gqa, LoCoCo(budget=24, eta=0.0, local_len=0).cache_for(gqa), ids))


def test_a_fixed_gate_of_zero_needs_no_weights_and_one_of_its_own_overrides_theirs():
    model = tiny_llama(4, 2)
    assert load_method("lococo", budget=24, eta=0).prepare(model) is None
    method, held = LoCoCo(budget=12, eta=0.25), slots_of(40)
    net = compressor(method)
    net.eta.fill_(0.25)
    assert torch.equal(compress(held, method, net).k, compress(held, LoCoCo(budget=12), net).k)
    net.eta.fill_(0.9)
    assert not torch.equal(compress(held, method, net).k, compress(held, LoCoCo(budget=12), net).k)


def test_training_on_one_document_beats_dropping_on_its_third_chunk_and_later():
    model = tiny_llama(4, 2, n_layers=1).requires_grad_(False)
    ids = tokens(128, seed=5)
    method = Untrained(budget=16, buffer=0, normalizer_init=0.1)
    net = method.new_compressors(model)
    for conv in net[0].convs:
        conv.weight.data *= 0.01

    class Student(LoCoCo):
        def prepare(self, model):
            return net

    def chunks(student: LoCoCo, optimizer=None) -> float:
        cache, losses = student.cache_for(model, prompt_len=128), []
        for chunk in ids.split(16, dim=1):
            layer = cache.layers[0].inner
            due = layer.due
            layer.detach()
            logits = model(chunk, past_key_values=cache, use_cache=True).logits
            if due:
                loss = F.cross_entropy(logits[0, :-1], chunk[0, 1:])
                losses.append(loss.item())
                if optimizer:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        assert len(losses) == 6  # chunks 3 to 8
        return sum(losses) / len(losses)

    student = Student(budget=16, buffer=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-2, weight_decay=0.0)
    with torch.no_grad():
        dropping = chunks(LoCoCo(budget=16, buffer=0, eta=0.0))
    for _ in range(50):
        chunks(student, optimizer)
    with torch.no_grad():
        trained = chunks(student)
    assert trained < dropping - 0.1
    assert math.isfinite(trained)
