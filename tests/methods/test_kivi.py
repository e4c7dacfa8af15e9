"""KIVI against its state by hand, its bytes, and a cache that was never packed but rounded."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kernels import Rules
from kernels.quantize import dequantize, quantize
from methods import load_method
from methods.core.contract import Stage, Step
from methods.core.errors import BudgetMiss, UserError
from methods.core.meter import nbytes
from methods.core.stores.codec import CodecCache
from methods.core.stores.quantized import QuantizedStore
from methods.core.stores.scheme import Scheme
from methods.kivi import KIVI
from tests.bounds import MILD, bound, near, near_codes, run_off
from tests.kernels.formula import formula, largest_logit
from tests.methods.conftest import run, tiny_llama
from tests.methods.layer import step_of

B, H, HQ, D = 2, 2, 4, 16


def small(**knobs):
    """KIVI with groups of 8 and 16 recent tokens, so that a short prompt is packed."""
    return load_method("kivi", **{"bits": 4, "store": {"group": 8, "residual": 16}, **knobs})


def tokens(n: int, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


class Layer:
    """One layer fed piece by piece, beside all that it was ever fed."""

    def __init__(self, store: QuantizedStore, rules: Rules | None = None, dtype: torch.dtype = torch.float32):
        self.cache, self.store = CodecCache(store), store
        self.rules, self.dtype = rules or Rules(D**-0.5), dtype
        self.k, self.v = torch.empty(B, H, 0, D, dtype=dtype), torch.empty(B, H, 0, D, dtype=dtype)
        self.g = torch.Generator().manual_seed(0)

    def feed(self, T: int, stage: Stage = Stage.DECODE) -> tuple[Tensor, Tensor]:
        """The layer's output for T tokens and what it should be, over the slots as they lie before packing."""
        n = self.k.shape[2]
        q, k, v = (torch.randn(B, h, T, D, generator=self.g).to(self.dtype) for h in (HQ, H, H))
        k[..., 3] *= 20  # an outlier channel, as keys have them
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        pos = torch.arange(n, n + T, dtype=torch.int32).expand(B, -1)
        seen = torch.full((B,), n, dtype=torch.int32)
        step = Step(0, 1, stage, q, k, v, pos, seen, False, torch.arange(B), self.rules)
        self.cache.append(step)
        held = self.store.read()
        out = self.cache.attend(step)
        k_pos = torch.arange(n + T).expand(B, 1, -1)
        expected = formula(q, *held, self.rules, pos, k_pos)
        logit, size = largest_logit(q, held[0], self.rules, pos, k_pos), held[1].abs().max().item()
        self.off = bound(self.dtype, n + T, logit, size=size, width=D, scores=torch.float32)
        self.cache.end_step(step)
        return out, expected

    def state(self) -> tuple[int, int, int, int]:
        """Packed and recent keys, packed and recent values."""
        if not self.store.parts:
            return 0, len(self.store), 0, len(self.store)
        part = self.store.parts[0]
        sides = [
            (0 if side.packed is None else len(side.packed), side.newest.shape[2]) for side in (part.keys, part.values)
        ]
        return *sides[0], *sides[1]


def rounded(x: Tensor, n: int, bits: int, group: int, dim: int) -> Tensor:
    """x with its first n tokens rounded to codes and back, all at once."""
    return torch.cat((dequantize(quantize(x[:, :, :n], bits, group, dim), x.dtype), x[:, :, n:]), dim=2)


def test_what_is_packed_by_hand():
    layer = Layer(KIVI(4, 4, group=2, residual=4))
    layer.feed(6, Stage.ENDS_PROMPT)
    assert layer.state() == (4, 2, 2, 4)
    layer.feed(1)
    assert layer.state() == (4, 3, 3, 4)
    layer.feed(1)
    assert layer.state() == (8, 0, 4, 4)


@pytest.mark.parametrize(
    ("n", "state"),
    [(1, (0, 1, 0, 1)), (15, (0, 15, 0, 15)), (16, (16, 0, 0, 16)), (17, (16, 1, 1, 16)), (48, (48, 0, 32, 16))],
)
def test_a_prompt_leaves_the_rest_of_whole_blocks_of_keys_and_a_window_of_values(n, state):
    layer = Layer(KIVI(2, 2, group=8, residual=16))
    layer.feed(n, Stage.ENDS_PROMPT)
    assert layer.state() == state


def test_values_may_leave_with_the_keys():
    layer = Layer(KIVI(2, 2, group=8, residual=16, values="blocks"))
    layer.feed(40, Stage.ENDS_PROMPT)
    assert layer.state() == (32, 8, 32, 8)
    for _ in range(7):
        layer.feed(1)
    assert layer.state() == (32, 15, 32, 15)
    layer.feed(1)
    assert layer.state() == (48, 0, 48, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (4, 2), (3, 8), (16, 4), (4, 16)])
@pytest.mark.parametrize("prompt", [5, 37])
def test_every_step_attends_to_what_a_rounded_cache_would_hold(prompt, key_bits, value_bits, dtype):
    layer = Layer(KIVI(key_bits, value_bits, group=8, residual=16), dtype=dtype)
    out, expected = layer.feed(prompt, Stage.ENDS_PROMPT)
    near(out, expected, layer.off)  # the prompt's own keys and values, in full
    for T in [1] * 40 + [23, 1, 1, 64, 1]:
        out, expected = layer.feed(T, Stage.DECODE if T == 1 else Stage.TURN)
        near(out, expected, layer.off)
        n = layer.k.shape[2]
        k, v = layer.store.read()
        n_keys, n_values = n - n % 16, max(0, n - 16)
        assert torch.equal(k, layer.k if key_bits == 16 else rounded(layer.k, n_keys, key_bits, 8, 2))
        assert torch.equal(v, layer.v if value_bits == 16 else rounded(layer.v, n_values, value_bits, 8, 3))
    assert layer.store.pos[0, 0].tolist() == list(range(layer.k.shape[2]))


def test_what_is_packed_is_never_packed_again():
    layer = Layer(KIVI(2, 2, group=8, residual=16))
    layer.feed(40, Stage.ENDS_PROMPT)
    before = [
        x.clone() for side in (layer.store.parts[0].keys, layer.store.parts[0].values) for x in side.packed.tensors()
    ]
    for _ in range(50):
        layer.feed(1)
    after = [x for side in (layer.store.parts[0].keys, layer.store.parts[0].values) for x in side.packed.tensors()]
    for old, new in zip(before, after):
        assert torch.equal(new[:, :, : old.shape[2]], old)
        assert new.shape[2] > old.shape[2]


def test_decoding_does_not_copy_the_cache():
    layer = Layer(KIVI(4, 4, group=8, residual=16))
    layer.feed(400, Stage.ENDS_PROMPT)
    layer.feed(1)
    moved, before = [0, 0], (0, 0)
    for _ in range(60):
        layer.feed(1)
        side = layer.store.parts[0].values
        now = side.arrays[0].buffer.data_ptr(), side.recent.data_ptr()
        moved = [n + (a != b) for n, a, b in zip(moved, now, before)]
        before = now
    # codes move when they have grown by a sixteenth; the few recent tokens when a sixteenth of the bytes is used up
    assert moved[0] <= 4 and moved[1] <= 60 // 5


@pytest.mark.parametrize(
    ("bits", "group", "total"),
    [
        (2, 32, 812_122_112),
        (2, 64, 678_166_528),
        (2, 128, 611_188_736),
        (4, 32, 1_347_944_448),
        (4, 128, 1_147_011_072),
    ],
)
def test_bytes_of_llama_8b_at_32k_by_hand(bits, group, total):
    keys, values = KIVI(bits, bits, group, 128).schemes[0]
    assert 32 * 8 * (keys.nbytes(32_768, 128, 2) + values.nbytes(32_768, 128, 2)) == total


def test_parts_of_those_bytes_by_hand():
    keys, values = KIVI(2, 2, 32, 128).schemes[0]
    assert keys.nbytes(32_768, 128, 2) == 1_572_864 and values.nbytes(32_768, 128, 2) == 1_599_488
    assert keys.nbytes(100, 128, 2) == values.nbytes(100, 128, 2) == 100 * 128 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (8, 4), (3, 3), (16, 2)])
@pytest.mark.parametrize("n", [5, 16, 90])
def test_measured_bytes_are_the_formula(n, key_bits, value_bits, dtype):
    layer = Layer(KIVI(key_bits, value_bits, group=8, residual=16), dtype=dtype)
    layer.feed(n, Stage.ENDS_PROMPT)
    nk, nv = (n - n % 16, max(0, n - 16))
    nk, nv = 0 if key_bits == 16 else nk, 0 if value_bits == 16 else nv
    by_hand = (nk + nv) * D // 8 * 4 + (2 * n - nk - nv) * D * dtype.itemsize  # scales and what is not packed
    by_hand += nk * D * key_bits // 8 + nv * D * value_bits // 8
    store = layer.store
    assert nbytes(store.tensors()) - store.overhead() == B * H * by_hand
    assert store.overhead() <= B * H * n * 4  # positions
    assert store.budget_bytes([H * n * 2 * D * dtype.itemsize] * B) == [H * by_hand] * B


def test_bytes_stay_the_formula_and_the_free_places_while_decoding():
    layer = Layer(KIVI(2, 2, group=8, residual=16))
    layer.feed(40, Stage.ENDS_PROMPT)
    keys, values = layer.store.schemes[0]
    for n in range(41, 200):
        layer.feed(1)
        by_hand = B * H * (keys.nbytes(n, D, 4) + values.nbytes(n, D, 4))
        assert nbytes(layer.store.tensors()) - layer.store.overhead() == by_hand
    assert by_hand < 0.25 * B * H * 199 * 2 * D * 4


@pytest.mark.parametrize(
    "knobs", [{"bits": 16}, {"bits": 2, "store": {"residual": 128}}, {"bits": None, "budget": 1.0}]
)
def test_sixteen_bits_or_a_residual_of_all_is_the_full_cache_bit_for_bit(knobs, any_heads):
    ids, new = tokens(90), tokens(20, seed=2)
    expected = run(any_heads, load_method("full").cache_for(any_heads), ids, new=new)
    assert torch.equal(run(any_heads, load_method("kivi", **knobs).cache_for(any_heads), ids, new=new), expected)


def test_fewer_bits_are_farther_from_the_full_cache(any_heads):
    ids, new = tokens(90), tokens(20, seed=2)
    full = run(any_heads, load_method("full").cache_for(any_heads), ids, new=new)
    errors = []
    for bits in (8, 4, 3, 2):
        out = run(any_heads, small(bits=bits).cache_for(any_heads), ids, new=new)
        assert torch.equal(out[:, 0], full[:, 0])  # the prompt attends in full
        errors.append((out - full).abs().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("chunks", [[30, 30, 30], [1, 50, 39], [89, 1], [40] + [5] * 10])
def test_a_prompt_in_chunks_is_packed_once_whole(chunks, any_heads):
    ids, new = tokens(90), tokens(20, seed=2)
    whole, parts = small().cache_for(any_heads), small().cache_for(any_heads, prompt_len=90)
    expected = run(any_heads, whole, ids, new=new)
    near_codes(run(any_heads, parts, ids, chunks=chunks, new=new), expected, parts, whole, 90, before=1)
    assert parts.report().held_prompt == whole.report().held_prompt


def test_rows_of_a_padded_batch_are_packed_as_if_alone(any_heads):
    lengths, new = [90, 13, 61, 32], tokens(20, rows=4, seed=2)
    ids = tokens(90, rows=4)
    mask = torch.tensor([[0] * (90 - n) + [1] * n for n in lengths])
    batch = small().cache_for(any_heads)
    actual = run(any_heads, batch, ids, new=new, mask=mask)
    for row, n in enumerate(lengths):
        alone = small().cache_for(any_heads)
        expected = run(any_heads, alone, ids[row : row + 1, 90 - n :], new=new[row : row + 1])
        near_codes(actual[row], expected[0], batch, alone, n, row, before=1)
        for layer in range(2):
            ours, theirs = batch.layers[layer].inner.store, alone.layers[layer].inner.store
            for positions in ours.pos[row]:
                assert positions[positions >= 0].tolist() == list(range(n + 20))
            if theirs.parts:
                assert ours.parts[row].keys.n_final == theirs.parts[0].keys.n_final == (n + 20) // 16 * 16
                assert ours.parts[row].values.n_final == theirs.parts[0].values.n_final == n + 20 - 16
    report = batch.report()
    batch.check_budget()
    H = any_heads.config.num_key_value_heads
    keys, values = KIVI(4, 4, 8, 16).schemes[0]
    assert report.held_prompt - report.overhead == 2 * H * sum(
        keys.nbytes(n, D, 4) + values.nbytes(n, D, 4) for n in lengths
    )


def test_a_padded_later_turn_goes_on_with_different_numbers_of_tokens(gqa):
    ids, turn, new = tokens(50, rows=2), tokens(9, rows=2, seed=3), tokens(20, rows=2, seed=2)
    mask = torch.cat((torch.ones(2, 50, dtype=torch.long), torch.tensor([[1] * 9, [0] * 5 + [1] * 4])), dim=1)

    def talk(rows: slice, columns: list[int]) -> tuple[Tensor, Cache]:
        cache = small().cache_for(gqa)
        run(gqa, cache, ids[rows])
        seen = mask[rows][:, columns]
        out = []
        with torch.no_grad():
            pos = (seen.cumsum(-1) - 1)[:, 50:]
            step = turn[rows][:, [c - 50 for c in columns[50:]]]
            out.append(gqa(step, attention_mask=seen, position_ids=pos, past_key_values=cache).logits[:, -1])
            for i in range(20):
                seen = torch.cat((seen, torch.ones_like(seen[:, :1])), dim=1)
                at = seen.sum(-1, keepdim=True) - 1
                out.append(
                    gqa(new[rows][:, i : i + 1], attention_mask=seen, position_ids=at, past_key_values=cache).logits[
                        :, 0
                    ]
                )
        return torch.stack(out, dim=1), cache

    together, batch = talk(slice(0, 2), list(range(59)))
    for row, columns in enumerate([list(range(59)), [*range(50), *range(55, 59)]]):
        expected, alone = talk(slice(row, row + 1), columns)
        near_codes(together[row], expected[0], batch, alone, 50, row)


@pytest.mark.parametrize("lengths", [[70, 70, 70], [70, 33, 52]])
def test_beams_go_on_from_the_row_they_are_told(lengths, gqa):
    ids, mask = tokens(70, rows=3), torch.tensor([[0] * (70 - n) + [1] * n for n in lengths])
    order = torch.tensor([2, 0, 0])
    new = tokens(40, rows=3, seed=2)

    def decode(cache, seen: Tensor) -> Tensor:
        out = []
        with torch.no_grad():
            for i in range(40):
                seen = torch.cat((seen, torch.ones_like(seen[:, :1])), dim=1)
                at = seen.sum(-1, keepdim=True) - 1
                out.append(
                    gqa(new[:, i : i + 1], attention_mask=seen, position_ids=at, past_key_values=cache).logits[:, 0]
                )
        return torch.stack(out, dim=1)

    moved, fresh = small().cache_for(gqa), small().cache_for(gqa)
    run(gqa, moved, ids, mask=mask)
    moved.reorder_cache(order)
    run(gqa, fresh, ids[order], mask=mask[order])
    actual, expected = decode(moved, mask[order]), decode(fresh, mask[order])
    for row in range(3):
        near_codes(actual[row], expected[row], moved, fresh, 70, row, row)


def test_beam_search_and_copies_work_once_packed(gqa):
    ids = tokens(90)
    out = gqa.generate(ids, max_new_tokens=30, num_beams=3, do_sample=False, past_key_values=small().cache_for(gqa))
    assert out.shape[1] <= 120
    cache = small().cache_for(gqa)
    run(gqa, cache, ids, new=tokens(5, seed=2))
    twin = copy.deepcopy(cache)
    rest = tokens(30, seed=4)
    with torch.no_grad():
        for i in range(30):
            at = torch.tensor([[95 + i]])
            a, b = (gqa(rest[:, i : i + 1], position_ids=at, past_key_values=c).logits for c in (cache, twin))
            assert torch.equal(a, b)


def test_a_sliding_layer_lets_go_of_whole_groups_that_no_later_query_sees(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=40)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids, new = tokens(100), tokens(150, seed=2)
    cache = small().cache_for(model)
    trimmed = run(model, cache, ids, new=new)
    assert cache.report().held_prompt - cache.report().overhead <= cache.report().asked
    assert len(cache.layers[0].inner.store) < 40 + 40 // 8 + 16
    monkeypatch.setattr("methods.core.stores.codec.spare", lambda window: 1000)
    whole = small().cache_for(model)
    near(run(model, whole, ids, new=new), trimmed, run_off(trimmed, MILD, layers=1, length=250))
    assert len(whole.layers[0].inner.store) == 39 + 150


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 4), (4, 16)])
def test_old_slots_go_although_keys_or_values_are_not_packed(key_bits, value_bits):
    store, step = KIVI(key_bits, value_bits, 8, 8), step_of(64)
    store.append(step.k, step.v, step.pos)
    store.pack(step)
    store.keep_newest(20)
    assert store.pos[0, 0].tolist() == list(range(40, 64))  # 24, whole groups of 8
    whole = step.k if key_bits == 16 else step.v
    assert torch.equal(store.read()[key_bits != 16], whole[:, :, 40:])


def test_no_place_is_made_for_more_recent_tokens_than_the_residual():
    store, step = KIVI(2, 2, 8, 8), step_of(2000)
    store.append(step.k, step.v, step.pos)
    store.pack(step)
    for i in range(40):
        new = step_of(1, stage=Stage.DECODE, start=2000 + i)
        store.append(new.k, new.v, new.pos)
        store.pack(new)
        (part,) = store.parts
        assert all(side.recent.shape[2] <= side.end - side.start + 8 for side in (part.keys, part.values))


def test_under_a_budget_the_best_setting_that_fits_is_taken():
    def chosen(budget: float, n: int, itemsize: int = 2) -> tuple[int, int, int, int]:
        store = KIVI(None, None, 32, 128, budget=budget)
        keys, values = store.choose(n, 128, 128, itemsize)
        return keys.bits, values.bits, keys.group, keys.residual

    assert chosen(1.0, 32_768) == (16, 16, 32, 128)
    assert chosen(0.57, 32_768) == (8, 8, 32, 128)  # 9 bits of 16, and the residual
    assert chosen(0.53, 32_768) == (8, 8, 128, 128)  # a quarter bit per scale
    assert chosen(0.5, 32_768) == (8, 4, 32, 128)
    assert chosen(0.26, 32_768) == (4, 2, 32, 128)
    assert chosen(0.1891, 32_768) == (2, 2, 32, 128)
    assert chosen(0.1890, 32_768) == (2, 2, 64, 128)
    # 384 keys of 5 bits, 272 values of 5 and the rest of 16 are 5,584 of 400 * 32 / 2
    assert chosen(0.5, 400) == (4, 4, 32, 128)
    # two bits and 128 recent values are 3,800 of 200 * 32 / 2: the residual is halved before the budget is given up
    assert chosen(0.5, 200) == (4, 4, 32, 64)
    assert chosen(0.1, 32_768) == (2, 2, 128, 128)  # nothing fits: the smallest


def test_a_halved_residual_is_still_whole_groups():
    residuals = [keys.residual for keys, _ in KIVI(None, None, 32, 224, budget=0.3).schemes]
    assert sorted(set(residuals)) == [32, 96, 224]


def test_keys_and_values_of_different_widths_are_counted_at_their_own():
    store = KIVI(None, None, 32, 128, budget=1.0)
    assert [scheme.bits for scheme in store.choose(1000, 128, 64, 2)] == [16, 16]  # all of it fits exactly


def test_a_number_of_slots_is_the_bytes_of_as_many_full_slots():
    store = KIVI(None, None, 32, 128, budget=8192)
    assert store.choose(32_768, 128, 128, 2) == KIVI(None, None, 32, 128, budget=0.25).choose(32_768, 128, 128, 2)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 200])
def test_measured_bytes_meet_the_budget(budget, gqa):
    cache = load_method("kivi", budget=budget).cache_for(gqa)
    run(gqa, cache, tokens(400))
    report = cache.report()
    assert report.held_prompt - report.overhead <= report.asked
    cache.check_budget()


def test_a_budget_that_nothing_fits_is_missed_and_not_hidden(gqa):
    cache = load_method("kivi", budget=0.05).cache_for(gqa)
    run(gqa, cache, tokens(90))
    with pytest.raises(BudgetMiss, match="kivi"):
        cache.check_budget()


def test_rows_choose_for_themselves(gqa):
    lengths = [90, 40]
    ids, mask = tokens(90, rows=2), torch.tensor([[1] * 90, [0] * 50 + [1] * 40])
    method = load_method("kivi", budget=0.4, store={"group": 8, "residual": 16})
    batch = method.cache_for(gqa)
    run(gqa, batch, ids, mask=mask)
    for row, n in enumerate(lengths):
        alone = method.cache_for(gqa)
        run(gqa, alone, ids[row : row + 1, 90 - n :])
        part, other = batch.layers[1].inner.store.parts[row], alone.layers[1].inner.store.parts[0]
        assert part.keys.scheme == other.keys.scheme and part.values.scheme == other.values.scheme
    batch.check_budget()
    bits = batch.layers[1].inner.nominal_bits()
    batch.reorder_cache(torch.tensor([1, 0]))
    assert bits[0] != bits[1] and batch.layers[1].inner.nominal_bits() == bits[::-1]


def test_explicit_bits_are_the_request():
    method = load_method("kivi", bits=4, budget=0.1)
    assert method.budget == 1 and (method.key_bits, method.value_bits) == (4, 4)
    apart = load_method("kivi", key_bits=8, value_bits=2)
    assert (apart.key_bits, apart.value_bits) == (8, 2)
    assert apart.config()["store"] == {
        "_target_": "KIVI",
        "group": 32,
        "residual": 128,
        "values": "sliding",
        "zero": "float",
    }


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"bits": 5}, "key_bits=5"),
        ({"bits": 4, "key_bits": 4}, "key_bits=4"),
        ({"key_bits": 4}, "value_bits=None"),
        ({"bits": 4, "store": {"group": 3}}, "store.group=3"),
        ({"bits": 4, "store": {"group": 0}}, "store.group=0"),
        ({"bits": 4, "store": {"residual": 48}}, "store.residual=48"),
        ({"bits": 4, "store": {"residual": 0}}, "store.residual=0"),
        ({"bits": 4, "store": {"values": "slide"}}, "store.values=slide"),
        ({"bits": 4, "store": {"zero": "double"}}, "store.zero=double"),
    ],
)
def test_settings_that_cannot_work_are_named(knobs, named):
    with pytest.raises(UserError, match=named.replace(".", "[.]")):
        load_method("kivi", **knobs)


def test_heads_that_cannot_be_packed_are_refused_before_the_prompt():
    with pytest.raises(UserError, match="width 6"):
        small(bits=2).cache_for(_model_of_width_6())


def _model_of_width_6():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_narrow_heads_have_narrower_groups_of_channels():
    assert Scheme(4, 32, 3).width(80) == 20
    assert Scheme(3, 32, 3).width(80) == 16  # eight codes of three bits fill whole bytes
    assert Scheme(2, 128, 3).width(96) == 96
    assert Scheme(2, 32, 2).width(80) == 32  # along tokens


def test_a_bfloat16_model_keeps_float16_scales():
    model = tiny_llama().to(torch.bfloat16)
    cache = small().cache_for(model)
    run(model, cache, tokens(90), new=tokens(20, seed=2))
    part = cache.layers[0].inner.store.parts[0]
    assert part.keys.packed.scale.dtype == part.values.packed.offset.dtype == torch.float16
    assert part.keys.newest.dtype == torch.bfloat16
    report = cache.report()
    assert report.held_prompt - report.overhead == report.asked


def test_nominal_bits_stand_beside_effective_ones():
    report = _prompted(bits=4).report()
    assert report.nominal_bits == 4 and report.effective_bits == report.share * 16
    # codes, a bit per number for scales, what is left in full precision and the positions
    assert 5 < report.effective_bits < 8
    assert _prompted(key_bits=8, value_bits=2).report().nominal_bits == 5
    plain = load_method("snapkv", budget=0.5).cache_for(model := tiny_llama())
    run(model, plain, tokens(90))
    assert plain.report().nominal_bits is None and plain.report().effective_bits is None


def _prompted(**knobs):
    model = tiny_llama().to(torch.bfloat16)
    cache = load_method("kivi", **knobs, store={"residual": 32}).cache_for(model)
    run(model, cache, tokens(400))
    return cache


def test_a_padded_row_that_has_packed_nothing_yet_can_be_repeated(gqa):
    ids, new = tokens(12), tokens(30, seed=2)
    ids[:, :2] = 0
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    cache = small().cache_for(gqa)
    run(gqa, cache, ids, mask=mask)
    alone = cache.fork()
    cache.batch_repeat_interleave(2)
    for i in range(new.shape[1]):
        mask = torch.cat((mask, torch.ones(1, 1, dtype=torch.long)), dim=1)
        at = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        with torch.no_grad():
            expected = gqa(new[:, i : i + 1], past_key_values=alone, use_cache=True, **at).logits
            at = {name: x.expand(2, -1) for name, x in at.items()}
            actual = gqa(new[:, i : i + 1].expand(2, -1), past_key_values=cache, use_cache=True, **at).logits
    near(actual, expected.expand_as(actual), run_off(expected))
    assert [one.held_end for one in cache.reports()] == [alone.report().held_end] * 2
