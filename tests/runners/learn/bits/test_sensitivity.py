"""What bits change in a layer, on numbers worked by hand and against plain attention."""

from functools import partial

import pytest
import torch

from kernels import Rules
from methods.core.contract import Stage, Step
from methods.core.store import Store
from methods.kvtuner import Pair
from runners.learn.bits.sensitivity import profile, shifts
from tests.bounds import MILD, bound, half_digit, near, run_off
from tests.tiny import tiny_model


class Coarse(Store):
    """Packs to multiples of a step that is the wider the fewer the bits."""

    def __init__(self, key_bits: int, value_bits: int, capacity: int | None = None, unit: float = 1.0):
        super().__init__(capacity)
        self.steps = [unit * 2.0**-bits if bits < 16 else 0.0 for bits in (key_bits, value_bits)]

    def pack(self, step: Step) -> None:
        for name, width in zip("kv", self.steps):
            if width:
                self.buffers[name] = (self.buffers[name] / width).round() * width


def prompt(q, k, v) -> Step:
    """One head: q, k, v [T, D]."""
    q, k, v = (torch.tensor(x, dtype=torch.float32)[None, None] for x in (q, k, v))
    n = q.shape[2]
    pos = torch.arange(n, dtype=torch.int32)[None]
    return Step(0, 1, Stage.ENDS_PROMPT, q, k, v, pos, torch.zeros(1), False, torch.zeros(1), Rules(1.0))


def test_two_tokens_worked_by_hand():
    # at 1 bit the grid has steps of 0.5 (exact here), at 0 bits of 1: keys (0, 0.7) become (0, 1), values (2, 0.8)
    # become (2, 1); the second query, 1, gives the second token 1/(1+e^-0.7) = 0.668188 and after it 0.731059
    step = prompt(q=[[1.0], [1.0]], k=[[0.0], [0.7]], v=[[2.0], [0.8]])
    keys, values, attention, output = shifts(step, Coarse, [0])[0].tolist()
    off = bound(torch.float32, 2)
    near(keys, (0 + 0.3 / 0.7) / 2, off)
    near(values, (0 + 0.2 / 0.8) / 2, off)
    # three probabilities are seen: 1, and a pair that moves by 0.062871 each
    near(attention, 2 * 0.062871 / 3, half_digit(6) + off)
    before, after = 2 * 0.331812 + 0.8 * 0.668188, 2 * 0.268941 + 1 * 0.731059
    near(output, (0 + abs(before - after) / before) / 2, 4 * half_digit(6) + off)


def test_keys_move_the_attention_and_values_only_the_output():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 70, 8, generator=g)
    pos = torch.arange(70, dtype=torch.int32)[None]
    step = Step(0, 1, Stage.ENDS_PROMPT, q, k, v, pos, torch.zeros(1), False, torch.zeros(1), Rules(8**-0.5))
    bits = [16, 2]
    full, coarse_v, coarse_k, both = shifts(step, Coarse, bits).unbind()
    # nothing is rounded; no logit of eight normal products reaches 8
    assert full.max() <= 2 * bound(torch.float32, 70, 8.0, width=8)
    assert coarse_v[0] == coarse_v[2] == 0 and coarse_v[1] > 0 and coarse_v[3] > 0
    assert coarse_k[1] == 0 and coarse_k[0] > 0 and coarse_k[2] > 0 and coarse_k[3] > 0
    assert both[:3].tolist() == [coarse_k[0], coarse_v[1], coarse_k[2]]


def test_errors_summed_before_they_are_divided_are_not_drowned_by_a_value_near_zero():
    step = prompt(q=[[1.0], [1.0]], k=[[0.0], [0.7]], v=[[2.0], [1e-7]])
    by_element, by_sum = (shifts(step, Coarse, [1], relative)[0].tolist() for relative in ("elements", "sums"))
    off = bound(torch.float32, 2)
    near(by_sum[0], 0.2 / 0.7, off)  # 0.7 becomes 0.5
    near([by_element[1], by_sum[1] * 1e6], [1 / 20, 1 / 20], off)  # of a value of 1e-7
    before, after = 2 * 0.331812, 2 * 0.377541
    near(by_sum[3], (after - before) / (2 + before), 4 * half_digit(6) + off)
    assert by_sum[2] == by_element[2]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_output_shift_is_that_of_attention_computed_whole(heads):
    Hq, H = heads
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, Hq, 77, 8, generator=g)
    k, v = torch.randn(2, 1, H, 77, 8, generator=g)
    pos = torch.arange(77, dtype=torch.int32)[None]
    step = Step(0, 1, Stage.ENDS_PROMPT, q, k, v, pos, torch.zeros(1), False, torch.zeros(1), Rules(8**-0.5))

    def attention(k, v):
        k, v = (x.repeat_interleave(Hq // H, dim=1) for x in (k, v))
        hidden = torch.ones(77, 77, dtype=torch.bool).triu(1)
        p = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return p, p @ v

    def coarse(x):
        return (x * 4).round() / 4

    (p, out), (p_hat, out_hat) = attention(k, v), attention(coarse(k), coarse(v))
    found = shifts(step, Coarse, [2])[0]
    off = 2 * bound(torch.float32, 77, 8.0, width=8)  # no logit of eight normal products reaches 8
    near(found[2], (p - p_hat).abs().sum() / (77 * 78 / 2 * Hq), off)
    relative_error = (out - out_hat).abs() / out.abs().clamp_min(1e-6)
    near(found[3], relative_error.mean(), off * (v.abs().max() / out.abs()).mean().item())


def test_every_layer_is_profiled_on_the_full_models_own_activations():
    model = tiny_model("llama")
    prompts = [list(range(1, 60)), list(range(30, 90))]
    fine, coarse = (profile(model, prompts, partial(Coarse, unit=unit), [8, 2], "elements") for unit in (1e-3, 1.0))
    assert len(fine) == 2 and set(fine[0]) == {Pair(k, v) for k in (8, 2) for v in (8, 2)}
    for layer in range(2):
        assert fine[layer][Pair(2, 2)].output < coarse[layer][Pair(2, 2)].output
        assert coarse[layer][Pair(8, 8)].output < coarse[layer][Pair(2, 2)].output
    # what is done to the first layer's keys and values must not reach the second layer
    single = [profile(model, [ids], partial(Coarse, unit=1.0), [2], "elements")[1][Pair(2, 2)].keys for ids in prompts]
    near(coarse[1][Pair(2, 2)].keys, sum(single) / 2, run_off(max(single), MILD))
    keys = _keys_of_the_second_layer(model, prompts[0])
    by_hand = ((keys - (keys * 4).round() / 4).abs() / keys.abs().clamp_min(1e-6)).mean().item()
    # a key near zero is off by more of itself
    off = run_off(keys, MILD)
    near(single[0], by_hand, (off / keys.abs()).mean().item())


@torch.no_grad()
def _keys_of_the_second_layer(model, ids):
    from transformers import DynamicCache

    from methods.core.bind import unbound

    with unbound(model) as stock:
        cache = DynamicCache()
        stock(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache.layers[1].keys
