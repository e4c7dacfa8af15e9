"""Caches that hold their numbers in 16 bits: what is rounded, what it costs, and that every way to feed them agrees."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kernels import Rules
from kernels.attend import reference
from kernels.attend_quantized import reference as of_codes
from methods import load_method
from methods.core.bind import unbound
from methods.core.binding.kv_layer import Handle
from methods.core.binding.rounding import Rounding
from methods.core.cache import KVCache
from methods.core.errors import UserError
from methods.core.eviction import Eviction
from methods.core.group import Rows, Shared
from methods.core.stores.codec import Codec
from tests.bounds import bound, edges_off, near
from tests.kernels.allocations import Largest
from tests.kernels.both_forms import using
from tests.methods.conftest import kept, run
from tests.methods.knobs import knobs_of, others
from tests.tiny import METHODS, SIZES, padded_prompt, tiny_model

NAMES = METHODS
TYPES = ["float16", "bfloat16"]
RULES = Rules(16**-0.5)
ENDS = Rounding.end_pass


def made(name: str, budget: float = 0.5, dtype: str = "float16"):
    more = {} if name == "full" else {"budget": budget}
    return load_method(name, cache_dtype=dtype, **more, **SIZES.get(name, {}))


def tokens(n: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (1, n), generator=torch.Generator().manual_seed(seed))


@dataclass
class Stream:
    """Queries, keys and values of every layer for the same tokens, as a model whose arithmetic is exact makes them."""

    q: Tensor  # [layers, B, Hq, T, D]
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, n: int, rows: int = 1, seed: int = 0) -> "Stream":
        g = torch.Generator().manual_seed(seed)
        return cls(*(torch.randn(2, rows, h, n, 16, generator=g) * size for h, size in ((4, 3), (2, 1), (2, 1))))

    def rows(self, *rows: int) -> "Stream":
        return Stream(*(x[:, list(rows)] for x in (self.q, self.k, self.v)))

    def feed(self, cache: KVCache, pieces: list[int], mask: Tensor | None = None, start: int = 0) -> Tensor:
        """Outputs [B, Hq, T, D] of the last layer for the tokens from `start` on, in pieces of these lengths."""
        out, at = [], start
        for size in pieces:
            here, at = slice(at, at + size), at + size
            for i, layer in enumerate(cache.layers):
                layer.seen += size
                handle = Handle(layer, self.k[i][:, :, here], self.v[i][:, :, here])
                last = layer.attend(handle, self.q[i][:, :, here], None if mask is None else mask[:, :at], RULES)
            out.append(last)
        return torch.cat(out, dim=2)


def off(length: int) -> float:
    """How far two outputs of a stream may be apart: its logits stay below 60, its values below 5."""
    return 2 * bound(torch.float32, length, 60.0, size=5.0, width=16)


class Stock(DynamicCache):
    """The stock cache, whose keys and values have been rounded to 16 bits when they came in."""

    def __init__(self, dtype: torch.dtype, config):
        super().__init__(config=config)
        self.rounded = dtype

    def update(self, key_states, value_states, *args, **kwargs):
        k, v = (x.to(self.rounded).to(x.dtype) for x in (key_states, value_states))
        return super().update(k, v, *args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mpt", "falcon-mqa"])
@pytest.mark.parametrize("dtype", TYPES)
def test_full_is_the_stock_cache_with_numbers_rounded_likewise(kind, dtype):
    model = tiny_model(kind)
    ids, new = tokens(40), tokens(4, seed=2)
    number = getattr(torch, dtype)
    with unbound(model):
        expected = run(model, Stock(number, model.config), ids, new=new)
        exact = run(model, DynamicCache(config=model.config), ids, new=new)
    actual = run(model, load_method("full", cache_dtype=dtype).cache_for(model), ids, new=new)
    allowed = edges_off(expected, number)
    near(actual, expected, allowed)
    assert (expected - exact).abs().max() > 0, "rounding changed nothing"


def test_the_model_s_own_type_and_auto_change_no_bit(gqa):
    ids, new = tokens(40), tokens(4, seed=2)
    expected = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    for dtype in ("auto", "float32"):
        assert torch.equal(run(gqa, load_method("full", cache_dtype=dtype).cache_for(gqa), ids, new=new), expected)
        assert torch.equal(run(gqa, load_method("full").cache_for(gqa, dtype=dtype), ids, new=new), expected)


@pytest.mark.parametrize("name", NAMES)
def test_budget_one_is_the_full_cache_of_the_same_type_in_half_the_bytes(name, gqa):
    ids, new = tokens(60), tokens(4, seed=2)
    full, ours, wide = (
        made("full").cache_for(gqa),
        made(name, 1.0).cache_for(gqa),
        made(name, 1.0, "auto").cache_for(gqa),
    )
    expected = run(gqa, full, ids, new=new)
    assert torch.equal(run(gqa, ours, ids, new=new), expected)
    run(gqa, wide, ids, new=new)
    half, whole = ours.report(), wide.report()
    assert 2 * half.full_prompt == whole.full_prompt and 2 * half.full == whole.full
    assert 2 * (half.held_prompt - half.overhead) == whole.held_prompt - whole.overhead
    assert half.overhead == whole.overhead and half.held_prompt <= half.asked + half.overhead


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(load_method(name), Eviction)])
def test_slots_of_a_budget_take_half_the_bytes(name, gqa):
    sizes = {}
    knobs = {"window": 8, "kernel": 3} if name in ("snapkv", "adakv", "snapkv+kivi") else {}
    for dtype in ("float16", "float32"):
        budget = {} if name == "full" else {"budget": 0.5}
        cache = load_method(name, cache_dtype=dtype, **budget, **knobs).cache_for(gqa)
        run(gqa, cache, tokens(90), new=tokens(3, seed=2))
        cache.check_budget()
        report, store = cache.report(), cache.layers[0].inner.store
        beside = sum(sum(layer.inner.holding().beside) for layer in cache.layers)
        sizes[dtype] = report.full_prompt, report.asked, report.held_end - beside
        packed = [side for part in getattr(store, "parts", []) for side in (part.keys.recent, part.values.recent)]
        for x in packed or store.read():
            assert x.dtype == getattr(torch, dtype)
    assert [2 * n for n in sizes["float16"]] == [*sizes["float32"]]


@pytest.mark.parametrize("case", others())
def test_other_knobs_hold_16_bits_too(case, gqa):
    name, knobs = knobs_of(case)
    ids, mask = padded_prompt([90, 61])
    for dtype, form in (("float16", "auto"), ("bfloat16", "reference")):
        method = load_method(name, cache_dtype=dtype, budget=0.5, **{**SIZES.get(name, {}), **knobs})
        with using(form):
            cache = method.cache_for(gqa)
            out = run(gqa, cache, ids, new=torch.cat([tokens(4, seed=2)] * 2), mask=mask)
        assert out.isfinite().all()
        held = {x.dtype for layer in cache.layers for x in layer.inner.tensors() if x.dim() == 4 and x.shape[-1] == 16}
        assert held <= {getattr(torch, dtype), torch.float16, torch.uint8}, held


@pytest.mark.parametrize("name", NAMES)
def test_sliding_layers_hold_as_many_slots_in_half_the_bytes(name, equipped):
    model, sizes = equipped("mistral"), []
    for dtype in ("float16", "float32"):
        method = load_method(name, cache_dtype=dtype, **({} if name == "full" else {"budget": 1.0}))
        cache = method.cache_for(model)
        out = run(model, cache, tokens(60), new=tokens(6, seed=2))
        assert out.isfinite().all()
        report = cache.report()
        sizes.append((report.full, report.held_prompt - report.overhead))
    assert [2 * n for n in sizes[0]] == [*sizes[1]]


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(load_method(name), Codec)])
def test_residual_windows_are_held_in_16_bits_and_codes_stay_as_they_are(name, gqa):
    sizes = {}
    for dtype in ("float16", "float32"):
        method = load_method(name, cache_dtype=dtype, key_bits=4, value_bits=4, store={"residual": 32})
        cache = method.cache_for(gqa)
        run(gqa, cache, tokens(90), new=tokens(3, seed=2))
        part = cache.layers[1].inner.store.parts[0]
        assert part.keys.recent.dtype == part.values.recent.dtype == getattr(torch, dtype)
        assert all(side.arrays[1].buffer.dtype == torch.float16 for side in (part.keys, part.values))  # scales
        codes = sum(x.nbytes for side in (part.keys, part.values) for x in side.arrays)
        sizes[dtype] = codes, sum(side.newest.nbytes for side in (part.keys, part.values))
    assert sizes["float16"][0] == sizes["float32"][0] > 0
    assert 2 * sizes["float16"][1] == sizes["float32"][1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_chunks_padding_and_company_change_nothing(name, gqa):
    """A number is rounded once, as it comes in: every query sees the same keys, however the prompt was cut."""
    stream = Stream.of(74)
    lengths = [70, 41]
    whole = made(name).cache_for(gqa)
    expected = stream.feed(whole, [70, 1, 1, 1, 1])
    if not made(name).changes_prompt:
        parts = made(name).cache_for(gqa, prompt_len=70)
        actual = stream.feed(parts, [30, 5, 35, 1, 1, 1, 1])
        assert [kept(parts, 1, 0, h) for h in (0, 1)] == [kept(whole, 1, 0, h) for h in (0, 1)]
        near(actual, expected, off(74))
    both = Stream.of(74, rows=2, seed=3)
    mask = torch.ones(2, 74).long()
    mask[1, : 70 - lengths[1]] = 0
    padded = made(name).cache_for(gqa)
    together = both.feed(padded, [70, 1, 1, 1, 1], mask)
    for row, n in enumerate(lengths):
        mine = Stream(*(x[:, row : row + 1, :, 70 - n :] for x in (both.q, both.k, both.v)))
        alone = made(name).cache_for(gqa, samples=[row])
        apart = mine.feed(alone, [n, 1, 1, 1, 1])
        assert [kept(padded, 1, row, h) for h in (0, 1)] == [kept(alone, 1, 0, h) for h in (0, 1)]
        near(together[row : row + 1, :, 70 - n :], apart, off(74))


def test_members_of_a_shared_prompt_are_what_they_are_alone(gqa):
    stream = Stream.of(74)
    methods = [method for method in map(made, NAMES) if not method.changes_prompt]
    shared = made("full").cache_for(gqa, prompt_len=70)
    followers = [method.cache_for(gqa, prompt_len=70) for method in methods]
    for i, layer in enumerate(shared.layers):
        layer.inner = Shared(layer.inner, [cache.layers[i].inner for cache in followers])
    prompt = stream.feed(shared, [30, 40])
    batch = made("full").cache_for(gqa, prompt_len=70, samples=[0] * len(methods))
    batch.resume_from(shared, rows=torch.zeros(len(methods), dtype=torch.long))
    for i, layer in enumerate(batch.layers):
        layer.inner = Rows([(row, row + 1, cache.layers[i].inner) for row, cache in enumerate(followers)])
    together = stream.rows(*[0] * len(methods)).feed(batch, [1, 1, 1, 1], start=70)
    for row, method in enumerate(methods):
        alone = method.cache_for(gqa)
        expected = stream.feed(alone, [70, 1, 1, 1, 1])
        assert [kept(followers[row], 1, 0, h) for h in (0, 1)] == [kept(alone, 1, 0, h) for h in (0, 1)], method.name
        near(prompt, expected[:, :, :70], off(74))
        near(together[row : row + 1], expected[:, :, 70:], off(74))


@pytest.mark.parametrize("name", NAMES)
def test_rows_change_places_and_copies_go_on_alike(name, gqa):
    cache, stream = made(name).cache_for(gqa), Stream.of(74, rows=2)
    stream.feed(cache, [70, 1])
    twin = cache.fork()
    twin.reorder_cache(torch.tensor([1, 1, 0]))
    ours = stream.feed(cache, [1, 1], start=71)
    theirs = stream.rows(1, 1, 0).feed(twin, [1, 1], start=71)
    near(theirs, ours[[1, 1, 0]], off(74))
    assert twin.report().held_end > cache.report().held_end


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_makes_nothing_of_the_caches_size_in_float32(name, form, gqa, monkeypatch):
    for module, size in ((reference, "WIDENED"), (of_codes, "UNPACKED")):
        monkeypatch.setattr(module, size, 1 << 10)
    method = made(name, 1.0) if name == "lococo" else made(name)  # its memory is fused now and then, in float32
    cache, stream = method.cache_for(gqa), Stream.of(323)
    stream.feed(cache, [320, 1, 1])
    held = max(x.numel() for layer in cache.layers for x in layer.inner.tensors() if x.dtype == torch.float16)
    with using(form), Largest() as largest:
        stream.feed(cache, [1], start=322)
    assert largest.elements < max(held, 2 * 160 * 16) / 2


def test_what_float16_does_not_hold_is_refused_with_layer_side_and_size(gqa):
    for T, start in ((40, 0), (1, 40)):
        for layer, side, what in ((1, "k", "keys"), (0, "v", "values")):
            stream, cache = Stream.of(41), made("snapkv").cache_for(gqa)
            if start:
                stream.feed(cache, [start])
            getattr(stream, side)[layer][0, 1, start, 3] = -7e4
            with pytest.raises(
                UserError, match=rf"cache\.dtype=float16: {what} of layer {layer} reach 70000.*bfloat16"
            ):
                stream.feed(cache, [T], start=start)
            wide = made("snapkv", dtype="bfloat16").cache_for(gqa)
            assert stream.feed(wide, [40, 1]).isfinite().all()
    stream.k[0, 0, 0, 0, 0] = 65519.0  # rounds to the largest number that there is
    stream.v[0] = 1.0
    made("full").cache_for(gqa)
    assert (
        Stream(*(x.abs().clamp(max=65519.0) for x in (stream.q, stream.k, stream.v)))
        .feed(made("full").cache_for(gqa), [40])
        .isfinite()
        .all()
    )


def test_on_a_device_a_decode_step_asks_nothing_and_the_ledger_asks_for_all(gqa, monkeypatch):
    stream, cache = Stream.of(42), made("full").cache_for(gqa)
    stream.feed(cache, [40])
    monkeypatch.setattr(type(cache.rounding), "end_pass", lambda self, wait: unasked(self))
    stream.k[1][0, 0, 40, 0] = 1e6
    stream.feed(cache, [1, 1], start=40)
    with pytest.raises(UserError, match="keys of layer 1 reach 1e"):
        cache.report()


def unasked(rounding) -> None:
    """`Rounding.end_pass` as it is where the device would have to be waited for."""
    check, rounding.check = rounding.check, lambda: None
    ENDS(rounding, wait=False)
    rounding.check = check


def test_a_type_that_no_cache_holds_is_refused_before_anything_is_bound():
    model = tiny_model("llama")
    before = set(model.__dict__)
    for given in ("int8", "half", torch.float64):
        with pytest.raises(UserError, match=r"cache\.dtype=\w+: give auto, float32, float16, bfloat16"):
            load_method("full").cache_for(model, dtype=given)
    with pytest.raises(UserError, match=r"cache\.dtype=fp16"):
        load_method("full", cache_dtype="fp16")
    assert set(model.__dict__) == before


def test_a_16_bit_model_may_hold_another_type():
    model = tiny_model("llama").bfloat16()
    ids = tokens(30)
    for dtype in ("float16", "float32"):
        cache = load_method("snapkv", budget=20, window=4, cache_dtype=dtype).cache_for(model)
        assert run(model, cache, ids, new=tokens(3)).dtype == torch.bfloat16
        assert cache.layers[0].inner.store.k.dtype == getattr(torch, dtype)
