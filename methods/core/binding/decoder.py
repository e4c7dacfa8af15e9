"""The layers of a model that a KVCache can go under: its text decoder's attention modules, or why there are none.

Decided by what modules and the stock cache are made of, never by an architecture's name. What cannot be seen from
outside shows when the model runs: self_check.py lets a small copy do so before the model itself is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from methods.core.errors import UserError

# layers of the stock cache that hold keys and values of tokens and nothing else
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class CannotBind(UserError):
    """A model that our caches cannot go under; reason: without the model's name."""

    def __init__(self, kind: str, reason: str):
        super().__init__(f"model: {kind} cannot be bound, {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a model.

    config: its configuration.  modules: one attention module per layer, in order.  configs: every configuration that
    says which attention these modules and the masks made for them use.
    """

    config: Any
    modules: list[nn.Module]
    configs: list[Any]


def decoder_of(model: PreTrainedModel, adapted: Container[str]) -> Decoder:
    """The decoder of `model`; adapted: model types whose attention is replaced instead of told what to call.

    Raises CannotBind when something in its structure keeps our caches out.
    """
    config = model.config.get_text_config(decoder=True)
    kind = config.model_type
    root = _root(model)
    modules = _attention(root)
    reason = _obstacle(root, config, modules, kind in adapted)
    if reason:
        raise CannotBind(kind, reason)
    configs = {id(one): one for one in (config, *(getattr(m, "config", config) for m in (root, *modules)))}
    return Decoder(config, modules, list(configs.values()))


def _root(model: PreTrainedModel) -> nn.Module:
    """The module that holds the text decoder's layers; the whole model where it does not say."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) and _attention(decoder) else model


def _attention(root: nn.Module) -> list[nn.Module]:
    modules = [m for m in root.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    return sorted(modules, key=lambda m: -1 if m.layer_idx is None else m.layer_idx)


def _obstacle(root: nn.Module, config: Any, modules: list[nn.Module], adapted: bool) -> str | None:
    """Why a decoder cannot be bound, as far as its structure shows it."""
    n_layers = getattr(config, "num_hidden_layers", None)
    if any(getattr(m, "is_cross_attention", False) or type(m).__name__.endswith("CrossAttention") for m in modules):
        return "its decoder also attends to something other than its own tokens (cross-attention)"
    if names := sorted({type(layer).__name__ for layer in _stock_layers(config)} - {one.__name__ for one in PLAIN}):
        return f"its stock cache holds more than keys and values of tokens ({', '.join(names)})"
    kinds = set(getattr(config, "layer_types", None) or ())
    if names := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"some of its layers attend by other rules than causal or sliding ({', '.join(names)})"
    if [m.layer_idx for m in modules] != list(range(n_layers or -1)):
        twice = len(modules) > len({m.layer_idx for m in modules})
        return (
            "a layer has more than one attention (cross-attention, or several towers)"
            if twice
            else f"{len(modules)} of its {n_layers} layers have an attention that is known"
        )
    if not adapted and not all(uses_interface(type(m)) for m in modules):
        return "it computes its attention itself instead of through the attention interface of transformers"
    if any(hasattr(m, "sinks") for m in modules):
        return "its attention has learned sinks"
    if getattr(config, "alibi", False) is True:
        return "its positions are biases (config.alibi=true); the same architecture with rotary positions can"
    if any(getattr(m, "is_kv_shared_layer", False) for m in modules):
        return "some of its layers attend to another layer's keys and values"
    for name in ("head_dim", "num_key_value_groups"):
        if len({getattr(m, name, None) for m in modules}) > 1:
            return f"its layers differ in {name}"
    if any(getattr(m, "is_causal", True) is False for m in modules) or getattr(config, "is_causal", True) is False:
        return "its tokens attend to later ones too (is_causal=false)"
    return None


def _stock_layers(config: Any) -> Iterable[Any]:
    try:
        return DynamicCache(config=config).layers
    except Exception:  # a configuration that the stock cache cannot read says nothing here
        return ()


def uses_interface(attention: type) -> bool:
    """Whether an attention class calls the function that its configuration names; by its code and its parents'."""
    classes = [kind for kind in attention.__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    try:
        return any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind) for kind in classes)
    except (OSError, TypeError):  # no source at hand: the self-check decides
        return True


def drops_attention(module: nn.Module) -> bool:
    """Whether a module in training mode leaves out attention at random, as the stock functions do and ours do not."""
    names = ("attention_dropout", "attn_dropout", "attn_pdrop", "dropout", "attn_dropout_p")
    values = (getattr(module, name, 0.0) for name in names)
    rates = [one.p if isinstance(one, nn.Dropout) else one for one in values]
    return module.training and any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
