"""Calls without one of our caches meet the untouched model; what our cache cannot do is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache

from methods import load_method
from methods.core.bind import bind, unbound
from methods.core.errors import UserError
from methods.full import Full
from tests.bounds import MILD, near, run_off
from tests.tiny import ARCHITECTURES, feed, padded_prompt, tiny_model

LENGTHS = [21, 14, 8]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    """The untouched model, and a copy of it that has met a cache and answered through it."""
    stock = tiny_model(request.param)
    bound = copy.deepcopy(stock)
    through_our_cache(bound)
    return stock, bound


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@torch.no_grad()
def through_our_cache(model):
    ids, mask = padded_prompt(LENGTHS)
    feed(model, load_method("full").cache_for(model), ids, mask, [21])


@torch.no_grad()
def plain_calls(model):
    """Everything that a user may call without a cache of ours."""
    ids, mask = padded_prompt(LENGTHS)
    yield model(ids, attention_mask=mask).logits
    yield model(ids[:1], use_cache=False).logits
    yield feed(model, DynamicCache(config=model.config), ids, mask, [12, 8, 1])
    for knobs in ({}, {"num_beams": 2}, {"use_cache": False}):
        yield model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **knobs)


def test_calls_without_our_cache_are_the_untouched_models_bit_for_bit(pair):
    stock, bound = pair
    for expected, actual in zip(plain_calls(stock), plain_calls(bound), strict=True):
        assert torch.equal(actual, expected)
    assert bound.config._attn_implementation == stock.config._attn_implementation


def test_a_training_step_without_our_cache_is_the_untouched_models(pair):
    ids, mask = padded_prompt(LENGTHS)
    found = []
    for model in pair:
        model.train()
        torch.manual_seed(0)
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
        model.zero_grad(set_to_none=True)
        model.eval()
    assert len(found[0]) > 5
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_weights_of_attention_are_the_untouched_models_and_refused_with_our_cache():
    stock = tiny_model("llama", attn_implementation="eager")
    bound = copy.deepcopy(stock)
    through_our_cache(bound)
    ids, _ = padded_prompt([9])
    expected, actual = (m(ids, output_attentions=True).attentions for m in (stock, bound))
    assert len(actual) == 2 and all(map(torch.equal, actual, expected))
    with pytest.raises(UserError, match="output_attentions=True"):
        bound(ids, past_key_values=load_method("full").cache_for(bound), output_attentions=True)
    with pytest.raises(UserError, match="output_attentions=True"):
        bound.generate(
            ids, past_key_values=load_method("full").cache_for(bound), output_attentions=True, max_new_tokens=2,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert torch.equal(bound(ids).logits, stock(ids).logits)


@torch.no_grad()
def test_a_part_that_is_called_by_itself_takes_our_cache_and_a_pass_that_fails_leaves_nothing_behind(llama):
    ids, _ = padded_prompt([9])
    expected = llama(ids).logits
    hidden = llama.model(ids, past_key_values=load_method("full").cache_for(llama)).last_hidden_state
    near(llama.lm_head(hidden), expected, run_off(expected, MILD))
    for interrupted in (ZeroDivisionError, KeyboardInterrupt):
        cache = load_method("full").cache_for(llama)

        def fail(step, error=interrupted):
            raise error

        cache.layers[1].inner.append = fail
        with pytest.raises(interrupted):
            llama(ids, past_key_values=cache)
        assert torch.equal(llama(ids).logits, expected)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused_by_name(llama):
    ids, _ = padded_prompt([9])
    twin, untouched = copy.deepcopy(llama), tiny_model("llama")
    through_our_cache(twin)
    for other in (twin, twin.model, untouched):
        before, cache = other(ids, use_cache=False)[0], load_method("full").cache_for(llama)
        with pytest.raises(UserError, match=r"past_key_values: .*another model \(llama\).*cache_for"):
            other(ids, past_key_values=cache)
        assert torch.equal(other(ids, use_cache=False)[0], before)
        assert cache.get_seq_length() == 0
        fork = copy.deepcopy(cache)  # a cache that was refused, and a copy of it, go on as if nothing had been
        near(llama(ids, past_key_values=fork).logits, llama(ids).logits, run_off(llama(ids).logits, MILD))
    with unbound(llama), pytest.raises(UserError, match="past_key_values"):
        llama(ids, past_key_values=load_method("full").cache_for(llama))


@torch.no_grad()
def test_an_attention_that_is_set_later_is_the_one_that_plain_calls_meet(llama):
    model = copy.deepcopy(llama)
    through_our_cache(model)
    model.set_attn_implementation("eager")
    through_our_cache(model)
    assert model.config._attn_implementation == "eager"
    assert model(padded_prompt([9])[0], output_attentions=True).attentions[0] is not None


def test_a_method_that_is_gone_leaves_nothing_with_the_model(llama):
    class Heavy(Full):
        def prepare(self, model):
            made.append(weakref.ref(weights := torch.nn.Linear(8, 8)))
            return weights

    made, kept = [], Heavy()
    for _ in range(20):
        Heavy().cache_for(llama)
        kept.cache_for(llama)
    gc.collect()
    assert [one() is not None for one in made].count(True) == 1 and len(made) == 21
    cache = Heavy().cache_for(llama)  # which its cache keeps
    gc.collect()
    assert made[-1]() is cache.spec.prepared


@torch.no_grad()
def test_a_bound_model_can_be_copied_and_pickled(llama):
    through_our_cache(llama)
    ids, mask = padded_prompt([9])
    expected = feed(llama, load_method("snapkv", budget=0.5, window=4).cache_for(llama), ids, mask, [6, 1, 1, 1])
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        cache = load_method("snapkv", budget=0.5, window=4).cache_for(twin)
        assert torch.equal(feed(twin, cache, ids, mask, [6, 1, 1, 1]), expected)
        assert torch.equal(twin(ids).logits, llama(ids).logits)
        assert twin.config is not llama.config and twin.__dict__["_kvfrontier"]["passes"].configs[0] is twin.config


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "snapkv"])
def test_rows_are_chosen_and_repeated_by_the_caches_own_functions(llama, name):
    ids, mask = padded_prompt([15, 10, 6])
    knobs = {} if name == "full" else dict(budget=0.5, window=4, kernel=3)
    for rows, change in (
        ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
        ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache = load_method(name, **knobs).cache_for(llama)
        whole = feed(llama, load_method(name, **knobs).cache_for(llama), ids, mask, [12, 1, 1, 1])
        feed(llama, cache, ids[:, :12], mask[:, :12], [12])
        change(cache)
        later = feed(llama, cache, ids[rows], mask[rows], [1, 1, 1], start=12)
        near(later, whole[rows, 12:], run_off(whole[rows, 12:], MILD))
        assert cache.samples.tolist() == rows


def test_rows_are_numbered_on_the_device_that_holds_them(llama):
    cache, seen = load_method("h2o", budget=0.5).cache_for(llama), []
    ids, mask = padded_prompt([12, 12])
    feed(llama, cache, ids, mask, [12])
    for layer in cache.layers:
        layer.inner.reorder = lambda rows: seen.append(rows.device.type)
    # no GPU is here: a cache whose numbers are said to lie on another device
    cache._counts, cache._samples, cache._prompt_tokens = cache._counts.to("meta"), None, None
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(1)
    assert set(seen) == {"meta"}


def test_what_a_compressed_cache_cannot_do_says_so(llama):
    cache = load_method("full").cache_for(llama)
    for call in (cache.reset, lambda: cache.crop(-1), lambda: cache.offload(0), cache.layers[0].prefetch):
        with pytest.raises(NotImplementedError, match=r"cache"):
            call()
    for call in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="no rows yet"):
            call()
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    assert len(cache) == 2 and cache.is_initialized and cache.get_seq_length() == 0 and cache.get_max_length() == -1
    assert not cache.is_croppable and not cache.is_compileable
    assert bind(llama).n_layers == len(cache)
