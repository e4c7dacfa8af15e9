"""Puts LayerCaches under a transformers model.

The model's attention calls `cache.update`, which returns a handle instead of tensors; the handle travels through the
model to the attention function in adapters.py, which lets the layer's cache take in the step and answer it. Calls
without one of our caches meet the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.core.adapters import ADAPTERS, NAME, n_kv_heads
from methods.core.binding.decoder import CannotBind, Decoder, decoder_of, drops_attention
from methods.core.binding.lengths import Lengths
from methods.core.binding.passes import Passes
from methods.core.binding.prepared import remember
from methods.core.binding.rotation import Turning, turnings
from methods.core.binding.rounding import cache_dtype
from methods.core.binding.self_check import CHECK, self_check
from methods.core.cache import BINDING, KVCache
from methods.core.contract import Method, ModelSpec
from methods.core.contract.text import spans_of
from methods.full import Full


def cache_for(
    model: PreTrainedModel,
    method: Method,
    prompt_len: int | None = None,
    samples: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    spans: Sequence[Mapping[str, tuple[int, int]]] | None = None,
    dtype: str | torch.dtype | None = None,
    answers: Sequence[Sequence[int]] | None = None,
) -> KVCache:
    """A new cache of `method` for one batch, under a model that is bound if it was not; see Method.cache_for."""
    numbers = cache_dtype(dtype)
    bind(model)
    if tokenizer is not None:
        remember(model, tokenizer)
    return KVCache(model, method, prompt_len, samples, None if spans is None else spans_of(spans), numbers, answers)


def bind(model: PreTrainedModel, check: bool = True) -> ModelSpec:
    """Let `model` run on our caches; the second call does nothing. Returns what methods may know of it.

    check: try out a small copy first, unless the model was loaded with model.check=off; see binding/self_check.py.

    Raises UserError with the architecture's name when its attention cannot be reached or would not be the model's own;
    the model is left as it was.
    """
    state = model.__dict__.get(BINDING)
    if state is None:
        decoder = decoder_of(model, ADAPTERS)
        _need_whole_attention(decoder.config.model_type, decoder.modules)
        if check and model.__dict__.get(CHECK, True):
            self_check(model, decoder, full, ADAPTERS)
        state = _attach(model, decoder)
        model.__dict__[BINDING] = state
    _need_whole_attention(state["kind"], state["modules"])
    return state["spec"]


def full(model: PreTrainedModel) -> KVCache:
    """A full cache for a model that nobody has tried out."""
    bind(model, check=False)
    return KVCache(model, Full())


def _attach(model: PreTrainedModel, decoder: Decoder) -> dict[str, Any]:
    """Hooks on a model, and what binding notes of it."""
    kind, modules = decoder.config.model_type, decoder.modules
    turned = turnings(model, modules)
    spec = _spec(model, decoder.config, modules, turned)
    passes = Passes(NAME, decoder.configs, modules, ADAPTERS.get(kind), Lengths(model))
    passes.watch(model)
    for module in modules:
        module.register_forward_pre_hook(_extras, with_kwargs=True)
    return {"spec": spec, "turnings": turned, "kind": kind, "modules": modules, "passes": passes}


def _need_whole_attention(kind: str, modules: Iterable[nn.Module]) -> None:
    """Raises CannotBind where the model would leave attention out at random."""
    if any(map(drops_attention, modules)):
        raise CannotBind(kind, "in training mode it drops attention at random; model.eval() does not")


@contextmanager
def unbound(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model with its own attention inside the block, whatever cache it is given."""
    state = model.__dict__.get(BINDING)
    if not state:
        yield model
        return
    passes, before = state["passes"], state["passes"].barred
    passes.barred = True
    try:
        yield model
    finally:
        passes.barred = before


def _extras(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention block: leave what the cache's method asked for with its layer."""
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if not isinstance(cache, KVCache) or not cache.method.needs:
        return
    layer = cache.layers[module.layer_idx]
    if "hidden" in cache.method.needs:
        layer.extras["hidden"] = args[0] if args else kwargs["hidden_states"]
    if "rope" not in cache.method.needs:
        return
    turning = cache.turnings[layer.index]
    layer.extras["turned"], layer.extras["interleaved"] = turning.turns, turning.interleaved
    if turning.turns:
        layer.extras["cos"], layer.extras["sin"] = turning.factors(kwargs)


def _spec(model: PreTrainedModel, config: Any, modules: list[nn.Module], turned: list[Turning]) -> ModelSpec:
    n_heads = config.num_attention_heads
    first = next(model.parameters())
    return ModelSpec(
        name=config.name_or_path or config.model_type,
        n_layers=len(modules),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        max_positions=getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 0),
        dtype=first.dtype,
        device=first.device,
        ropes=[turning.rope for turning in turned],
        alibi=config.model_type == "mpt",
    )
