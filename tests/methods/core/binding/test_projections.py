"""The weights that methods are given make what the block computes, in every architecture, or are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods import load_method
from methods.core.capture import capture_blocks
from methods.core.errors import UserError
from tests.bounds import bound, near, run_off
from tests.tiny import ARCHITECTURES, feed, padded_prompt, tiny_model


def rough(name: str, dtype: torch.dtype = torch.float32):
    """A model whose norms are no identities and whose biases are no zeros."""
    model, g = tiny_model(name), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=g)
    return model.to(dtype)


def spec_of(model):
    return load_method("full").cache_for(model).spec


def projections(layer: int, name: str, dtype: torch.dtype = torch.float32):
    model = rough(name, dtype)
    return spec_of(model).projections(layer)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_projections_make_the_blocks_own_queries_keys_values_and_output(name):
    model = rough(name)
    spec = spec_of(model)
    spec.projections(0)  # found for all layers, in a pass of its own
    outs: dict[int, torch.Tensor] = {}
    modules = model.__dict__["_kvfrontier"]["modules"]
    for i, module in enumerate(modules):
        module.register_forward_hook(
            lambda _, args, out, i=i: outs.update({i: out[0] if isinstance(out, tuple) else out})
        )
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    for layer, (step, heads) in enumerate(capture_blocks(model, ids)):
        own = spec.projections(layer)
        for projection, expected, n in ((own.q, step.q_raw, spec.n_heads), (own.k, step.k_raw, spec.n_kv_heads),
                                        (own.v, step.v, spec.n_kv_heads)):  # fmt: skip
            assert projection.weight.shape == (n, spec.head_dim, 32)
            near(projection(step.hidden), expected.transpose(1, 2), run_off(expected))
        assert own.o.weight.shape == (spec.n_heads, spec.head_dim, 32)
        near(own.o.back(heads.transpose(1, 2)), outs[layer], run_off(outs[layer]))


def test_norms_and_biases_are_part_of_what_is_given():
    assert projections(0, "qwen3").q.norm is not None
    assert projections(1, "qwen2").k.bias is not None
    assert projections(1, "gpt2").o.bias is not None
    assert projections(0, "llama").v.norm is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_sixteen_bits_they_are_found_too(dtype):
    for name in ("llama", "gpt_neox", "qwen3"):
        assert projections(1, name, dtype).q.weight.dtype == dtype


class Packed(nn.Module):
    """A linear map that keeps its weights where nobody sees them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.bias = linear.in_features, linear.bias
        self.codes = nn.Parameter((linear.weight * 64).round().clamp(-127, 127).to(torch.int8), requires_grad=False)

    def forward(self, x):
        y = x @ (self.codes.to(x.dtype) / 64).T
        return y if self.bias is None else y + self.bias


def test_packed_weights_are_given_as_what_they_stand_for():
    model = rough("qwen2")
    for module in (layer.self_attn for layer in model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(module, name, Packed(getattr(module, name)))
    own = spec_of(model).projections(0).q
    codes = model.model.layers[0].self_attn.q_proj.codes
    near(
        own.weight.reshape(32, 32), codes.float() / 64, bound(torch.float32, 2, size=4.0)
    )  # a bias was added and taken off again
    assert own.bias is not None


def test_weights_nobody_knows_are_refused_by_name_and_nothing_else_is():
    model = rough("llama")
    ids, mask = padded_prompt([20])
    before = model(ids).logits
    attention = model.model.layers[1].self_attn
    attention.forward, plain = _doubled(attention), attention.forward
    spec = spec_of(model)
    with pytest.raises(
        UserError, match=r"llama: by which weights layer 1 makes its output is not known.*no weights work"
    ):
        spec.projections(0)
    attention.forward = plain
    near(feed(model, load_method("full").cache_for(model), ids, mask, (20,)), before, run_off(before))


def _doubled(attention):
    forward = attention.forward

    def doubled(*args, **kwargs):
        out, *rest = forward(*args, **kwargs)
        return (2 * out, *rest)

    return doubled


def test_a_copy_of_the_model_has_its_own_weights_and_an_edit_is_seen():
    model = rough("llama")
    first = spec_of(model).projections(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight += 1
    mine, theirs = spec_of(model).projections(0).v.weight, spec_of(other).projections(0).v.weight
    assert torch.equal(first.v.weight, mine) and not torch.equal(mine, theirs)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= 2
    near(spec_of(model).projections(0).v.weight, 2 * (theirs - 1), bound(torch.float32, 2, size=4.0))
