"""Eviction with a quantized store is a matter of configuration: snapkv chooses, kivi packs what stays."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from methods import load_method
from methods.adakv import AdaKV
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.eviction import EvictionCache
from methods.kivi import KIVI
from tests.bounds import near_codes
from tests.methods.conftest import kept, run
from tests.methods.layer import step_of


def tokens(n: int, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


PACKED = partial(KIVI, key_bits=4, value_bits=4, group=32, residual=128)


def small(bits: int = 4, **knobs):
    store = {"key_bits": bits, "value_bits": bits, "group": 8, "residual": 16}
    return load_method("snapkv+kivi", **{"budget": 0.5, "window": 8, "store": store, **knobs})


def test_the_slots_are_snapkvs_and_the_bytes_are_kivis(any_heads):
    ids, new = tokens(90), tokens(12, seed=2)
    both, plain = small().cache_for(any_heads), load_method("snapkv", budget=0.5, window=8).cache_for(any_heads)
    run(any_heads, both, ids, new=new)
    run(any_heads, plain, ids, new=new)
    H = any_heads.config.num_key_value_heads
    for layer in range(2):
        for head in range(H):
            assert kept(both, layer, 0, head) == kept(plain, layer, 0, head)
    report, other = both.report(), plain.report()
    keys, values = KIVI(4, 4, 8, 16).schemes[0]
    assert report.held_prompt - report.overhead == 2 * H * (keys.nbytes(45, 16, 4) + values.nbytes(45, 16, 4))
    assert report.held_prompt - report.overhead < 0.6 * (other.held_prompt - other.overhead)
    both.check_budget()


def test_what_is_kept_is_snapkvs_rounded(gqa):
    ids, new = tokens(90), tokens(20, seed=2)
    plain = run(gqa, load_method("snapkv", budget=0.5, window=8).cache_for(gqa), ids, new=new)
    errors = [
        (run(gqa, small(bits).cache_for(gqa), ids, new=new) - plain).abs().mean().item() for bits in (16, 8, 4, 2)
    ]
    assert errors[0] == 0 < errors[1] < errors[2] < errors[3]


def test_rows_of_a_padded_batch_do_not_affect_each_other(gqa):
    lengths, new = [90, 61, 40], tokens(20, rows=3, seed=2)
    ids, mask = tokens(90, rows=3), torch.tensor([[0] * (90 - n) + [1] * n for n in lengths])
    batch = small().cache_for(gqa)
    actual = run(gqa, batch, ids, new=new, mask=mask)
    for row, n in enumerate(lengths):
        alone = small().cache_for(gqa)
        expected = run(gqa, alone, ids[row : row + 1, 90 - n :], new=new[row : row + 1])
        near_codes(actual[row], expected[0], batch, alone, n, row, before=1)
        assert kept(batch, 1, row, 1) == kept(alone, 1, 0, 1)


@pytest.mark.parametrize("chunks", [[30, 30, 30], [40] + [5] * 10])
def test_a_prompt_in_chunks_is_packed_once_whole(chunks, gqa):
    ids, new = tokens(90), tokens(20, seed=2)
    whole, parts = small().cache_for(gqa), small().cache_for(gqa, prompt_len=90)
    expected = run(gqa, whole, ids, new=new)
    near_codes(run(gqa, parts, ids, chunks=chunks, new=new), expected, parts, whole, 90, before=1)
    assert kept(whole, 1) == kept(parts, 1)


def test_a_slot_cannot_be_dropped_once_it_is_packed():
    cache = EvictionCache(small(), None)
    step = step_of(60, heads=2, kv_heads=2, dim=16)
    cache.append(step)
    cache.end_step(step)
    assert cache.store.parts
    with pytest.raises(NotImplementedError, match="KIVI: cannot drop single slots"):
        cache.store.keep(torch.ones(1, 2, len(cache.store), dtype=torch.bool), 5)
    with pytest.raises(NotImplementedError, match="KIVI: cannot free"):
        cache.store.drop(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="KIVI: cannot follow"):
        cache.store.track("mass")


@pytest.mark.parametrize(
    ("name", "knobs", "parts", "said"),
    [
        ("snapkv", {}, {"store": PACKED, "allocator": AdaKV()}, "method.store=KIVI packs .*method.allocator=AdaKV"),
        ("h2o", {}, {"store": PACKED}, "method.store=KIVI packs .* drops single ones"),
        ("streaming_llm", {}, {"store": PACKED}, "method.store=KIVI packs .* drops single ones"),
        ("nacl", {"decode_interval": 4}, {"store": PACKED}, "method.store=KIVI packs .* drops single ones"),
        ("scissorhands", {}, {"allocator": AdaKV()}, "method.allocator=AdaKV lets heads hold different numbers"),
    ],
)
def test_a_pair_that_cannot_work_is_refused_before_anything_runs(name, knobs, parts, said):
    method = load_method(name, budget=1, **knobs)
    replace(method, **parts)  # where nothing is dropped it works
    with pytest.raises(UserError, match=said):
        replace(method, budget=0.5, **parts)


def test_heads_that_keep_different_numbers_are_refused():
    store = KIVI(4, 4, 8, 16)
    step = step_of(60, heads=2, kv_heads=2, dim=16)
    store.append(step.k, step.v, step.pos)
    mask = torch.ones(1, 2, 60, dtype=torch.bool)
    mask[0, 1, ::2] = False
    store.keep(mask, 60)
    with pytest.raises(NotImplementedError, match="different numbers of slots"):
        store.pack(step)
    assert step.stage is Stage.ENDS_PROMPT


def test_the_record_names_the_store():
    assert small().config()["store"] == {
        "_target_": "KIVI", "key_bits": 4, "value_bits": 4, "group": 8, "residual": 16,
    }  # fmt: skip
