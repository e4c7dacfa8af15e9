"""A model is edited for the passes of one method and for nothing else: parts replaced, projections not computed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from methods import load_method
from methods.core.binding.edits import Uncomputed, replaced, uncomputed
from methods.core.contract import LayerCache, Method, ModelSpec, Step
from methods.core.store import Store
from tests.bounds import near, run_off
from tests.tiny import ARCHITECTURES, feed, padded_prompt, tiny_model

N = 20


class Lower(LayerCache):
    """Keys and values of the layer below; its own are not looked at."""

    def __init__(self, layer: int):
        self.layer, self.store = layer, Store()

    def append(self, step: Step) -> None:
        if self.layer == 0:
            self.store.append(step.k, step.v, step.pos, step.padded)
        else:
            assert not step.k.any() and not step.v.any()

    def attend(self, step: Step) -> Tensor:
        store = self.store if self.layer == 0 else self.below(0).store
        return store.attend(step)

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()


@dataclass
class Sharing(Method):
    """The upper layer makes no keys and values of its own."""

    changes_prompt = True

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        self.parts = uncomputed(self.modules[1], spec, 1, "kv")
        return [Lower(i) for i in range(spec.n_layers)]

    def prepare(self, model):
        self.modules = model.__dict__["_kvfrontier"]["modules"]

    def edit(self, model, prepared):
        return replaced(self.parts)


def state(model) -> list:
    return [(name, id(part)) for name, part in model.named_modules()] + [
        (name, weight.data_ptr(), weight.sum().item()) for name, weight in model.named_parameters()
    ]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("qwen3", "gemma3")])
def test_keys_and_values_that_nobody_needs_are_not_computed_and_the_model_stays(name):
    model = tiny_model(name)
    ids, mask = padded_prompt([N + 3])
    before, plain = state(model), model(ids).logits
    cache = Sharing().cache_for(model)
    ran: set[str] = set()
    for child, part in model.__dict__["_kvfrontier"]["modules"][1].named_children():
        part.register_forward_hook(lambda m, args, out, child=child: ran.add(child))
    feed(model, cache, ids, mask, (N, 1, 2))
    own = cache.spec.projections(1)
    if own.k.source[1] is None:  # what stands in their place is another module
        assert not {own.k.source[0], own.v.source[0]} & ran and own.q.source[0] in ran
    else:
        assert own.q.source[0] not in ran
    assert len(cache.layers[0].inner.store) == N + 3 and not list(cache.layers[1].inner.tensors())
    assert state(model) == before
    near(model(ids).logits, plain, 0.0)
    near(feed(model, load_method("full").cache_for(model), ids, mask, (N, 1, 2)), plain, run_off(plain))


def test_what_is_left_of_a_fused_projection_is_its_queries():
    for name in ("phi3", "gpt_neox", "falcon-gqa", "mpt"):
        model = tiny_model(name)
        spec = load_method("full").cache_for(model).spec
        module = model.__dict__["_kvfrontier"]["modules"][1]
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        own = spec.projections(1)
        with replaced(uncomputed(module, spec, 1, "kv")), torch.no_grad():
            out = getattr(module, own.q.source[0])(x).unflatten(-1, (-1, spec.head_dim))
        near(out[..., own.q.source[1], :], own.q(x), run_off(own.q(x)))
        assert not out[..., own.k.source[1], :].any() and not out[..., own.v.source[1], :].any()


def test_other_caches_and_plain_calls_meet_the_untouched_model_also_after_a_pass_that_failed():
    model = tiny_model("llama")
    ids, mask = padded_prompt([N])
    plain, before = model(ids).logits, state(model)

    class Failing(Sharing):
        def end_pass(self, caches, step):
            assert isinstance(model.model.layers[1].self_attn.k_proj, Uncomputed)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        feed(model, Failing().cache_for(model), ids, mask, (N,))
    assert state(model) == before
    near(model(ids).logits, plain, 0.0)
    sharing, full = Sharing().cache_for(model), load_method("full").cache_for(model)
    feed(model, sharing, ids, mask, (N,))
    near(feed(model, full, ids, mask, (N,)), plain, run_off(plain))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        near(twin(ids).logits, plain, 0.0)


def test_parts_are_put_back_in_order_whatever_happens_inside():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = model[0]
    with pytest.raises(ValueError, match="stop"), replaced([(model, "0", nn.Identity()), (model, "0", nn.ReLU())]):
        assert isinstance(model[0], nn.ReLU)
        raise ValueError("stop")
    assert model[0] is first
    with pytest.raises(KeyError), replaced([(model, "0", nn.Identity()), (model, "7", nn.ReLU())]):
        pass
    assert model[0] is first
    zeros = Uncomputed(5)(torch.randn(2, 3, 4))
    assert zeros.shape == (2, 3, 5) and zeros.untyped_storage().nbytes() == 4
