"""The tests' models are what tests.bounds takes them for, and their runs as far apart as it allows, or a bit less."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from methods import load_method
from tests.bounds import LOUDEST, MILD, QUIET, SHARP, run_off
from tests.kernels.formula import logits
from tests.methods.conftest import tiny_llama
from tests.tiny import ARCHITECTURES, padded_prompt, tiny_model

PLANTED = 1 / 1000
# a slot with less of the attention moves nothing by more, whatever its logit
NOTED = 1 / 1000
HEADS = [(4, 2), (4, 4), (4, 1)]


@torch.no_grad()
def measured(model) -> tuple[float, float]:
    """Largest |logit| of a slot that gets attention, and largest |logit| of a token."""
    ids, found = padded_prompt([100, 100, 100])[0], [0.0]
    cache = load_method("full").cache_for(model)
    for layer in cache.layers:

        def taken(step, append=layer.inner.append):
            x, seen = logits(step.q, step.k, step.rules, step.pos, step.pos[:, None])
            share = x.masked_fill(~seen, -torch.inf).softmax(-1)
            found.append(x[share > NOTED].abs().max().item())
            append(step)

        layer.inner.append = taken
    out = model(ids, past_key_values=cache, use_cache=True).logits.abs().max().item()
    assert len(found) > len(cache.layers)
    return max(found), out


def of_this_size(found: list[tuple[float, float]], sharp: float, loud: float) -> None:
    for actual, said in zip(map(max, zip(*found, strict=True)), (sharp, loud), strict=True):
        assert said / 2 <= actual <= said


def test_the_methods_models_are_as_sharp_and_as_loud_as_their_bounds_take_them_for():
    of_this_size([measured(tiny_llama(*heads)) for heads in HEADS], SHARP, LOUDEST)


def test_the_other_models_are_as_sharp_and_as_loud_as_their_bounds_take_them_for(sharp_model):
    models = [copy.deepcopy(sharp_model), *map(tiny_model, ARCHITECTURES)]
    of_this_size([measured(model) for model in models], MILD, QUIET)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_run_lies_as_near_to_the_exact_one_as_is_allowed_and_not_much_nearer(layers):
    off, allowed = 0.0, run_off(layers=layers) / math.sqrt(2)  # which is for two runs
    for heads in HEADS:
        model = tiny_llama(*heads, n_layers=layers)
        exact = copy.deepcopy(model).double()
        for seed in range(3):
            ids = padded_prompt([100, 100, 100], seed)[0]
            off = max(off, (model(ids).logits.double() - exact(ids).logits).abs().max().item())
    assert allowed / 20 < off < allowed


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("what", ["k", "v", "out"])
def test_an_error_of_a_thousandth_in_one_head_of_a_layer_is_caught(what, at):
    model, ids = tiny_llama(), padded_prompt([100, 100, 100])[0]
    caches = [load_method("full").cache_for(model) for _ in range(2)]
    inner = caches[1].layers[at].inner

    def wrong(x):
        x = x.clone()
        x[:, 0] *= 1 + PLANTED
        return x

    if what == "out":
        attend = inner.attend
        inner.attend = lambda step: wrong(attend(step))
    else:
        append, attend = inner.append, inner.attend
        inner.append = lambda step: append(replace(step, **{what: wrong(getattr(step, what))}))
        inner.attend = lambda step: attend(replace(step, **{what: wrong(getattr(step, what))}))
    right, planted = (model(ids, past_key_values=cache, use_cache=True).logits for cache in caches)
    assert (planted - right).abs().max() > run_off(right)
