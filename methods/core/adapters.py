"""Attention functions that answer from our caches; they alone know attention modules.

One is registered with transformers; models that do not use its attention interface have one of their own each. A stock
attention function that meets a handle fails loudly, and these refuse what is not one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kernels import Rules
from methods.core.binding import sight
from methods.core.binding.decoder import CannotBind
from methods.core.binding.kv_layer import Handle
from methods.core.cache import KVCache

NAME = "kvfrontier"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    _need(key, Handle, module)
    kind = key.layer.cache.kind
    if dropout:
        raise CannotBind(kind, "in training mode it drops attention at random; model.eval() does not")
    if value is not None or key.layer.index != module.layer_idx:
        raise CannotBind(kind, "some of its layers attend to another layer's keys and values")
    for name in _NOT_OURS:
        if kwargs.get(name) is not None:
            raise CannotBind(kind, f"its attention also takes {name}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = key.layer.attend(key, query, attention_mask, Rules(scale, softcap, _window(kind, attention_mask)))
    return out.transpose(1, 2).contiguous(), None


#: what an attention function may be given beside queries, keys, values and a mask, and that changes its answer
_NOT_OURS = ("s_aux", "position_bias", "alibi", "attention_bias", "bias", "indices")


def _window(kind: str, mask: Tensor | None) -> int | None:
    """The window that a mask stands for. Raises CannotBind if it is not ours, or stands for more than a window."""
    seen = getattr(mask, "sight", None)
    if seen is None:
        raise CannotBind(kind, "it attends by a mask of its own making")
    if not seen.lawful:
        raise CannotBind(kind, "what its tokens see is neither all that came before them nor a sliding window")
    return seen.window


def _need(given: Any, kind: type, module: nn.Module) -> None:
    """Raises RuntimeError unless a step came through one of our caches."""
    if not isinstance(given, kind):
        raise RuntimeError(
            f"{type(module).__name__} attends to something other than its layer of the cache of method.cache_for(model)"
        )


def n_kv_heads(config: Any) -> int:
    """KV heads by a model's configuration; as many as query heads where it names none."""
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        return 1
    named = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return named or config.num_attention_heads


def _gptj_attn(self: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None = None) -> Any:
    _need(key, Handle, self)
    window = _window(key.layer.cache.kind, attention_mask)
    return key.layer.attend(key, query, attention_mask, Rules(1 / float(self.scale_attn), window=window)), None


def _mpt_forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: KVCache,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    _need(past_key_values, KVCache, self)
    B, T = hidden_states.shape[:2]
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
    q, k, v = (x.view(B, T, self.n_heads, self.head_dim).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    handle, _ = past_key_values.update(k, v, self.layer_idx)
    slopes = -position_bias[:, 0, -2].float()  # the bias one token back
    window = _window(past_key_values.kind, attention_mask)
    out = handle.layer.attend(handle, q, attention_mask, Rules(self.softmax_scale, window=window, slopes=slopes))
    return self.out_proj(out.transpose(1, 2).reshape(B, T, -1)), None


def _falcon_forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    layer_past: KVCache,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    _need(layer_past, KVCache, self)
    B, T = hidden_states.shape[:2]
    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    # the new architecture hands out each key and value once per query head of its group
    group = k.shape[1] // n_kv_heads(self.config)
    k, v = k[:, ::group], v[:, ::group]
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    handle, _ = layer_past.update(k, v, self.layer_idx)
    window = _window(layer_past.kind, attention_mask)
    out = handle.layer.attend(handle, q, attention_mask, Rules(1 / math.sqrt(self.head_dim), window=window))
    return self.dense(out.transpose(1, 2).reshape(B, T, -1)), None


#: models that do not use the attention interface: which method of the attention module to replace, and by what
ADAPTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gptj": ("_attn", _gptj_attn),
    "mpt": ("forward", _mpt_forward),
    "falcon": ("forward", _falcon_forward),
}

AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sight.mask)
