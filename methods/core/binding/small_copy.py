"""A model of the same architecture as another and a few milliseconds large: random, in float32, on the CPU.

Its configuration is the other's with fewer layers, heads and experts and a small vocabulary; every length in tokens at
which something changes (windows, chunks, sparse selections, switches of RoPE) is `SPAN`, so that a text of 24 tokens
meets it. Widths of heads stay, because sections of RoPE and scales hang on them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

#: tokens to which windows, chunks and switches are cut
SPAN = 8
VOCAB = 128
#: ids below are kept for special tokens, those of images included
FIRST_WORD = 32
HEADS, POSITIONS, EXPERTS = 4, 256, 4
FEED_FORWARD = 64
#: numbers in a matrix outside of the text decoder from which on it is not drawn, since it belongs to a tower
MOST = 1_000_000

_TOKEN = re.compile(r"(_token_id|_token_index|_id|_index)$")
_HEADS = re.compile(r"(^|_)n?_?(heads|head|heads_kv|heads_per_layer|query_group_num)$")
_SPAN = re.compile(r"window|chunk|span|local|topk_blocks|index_topk|keep|block_size|floor|extent")
_NO_SPAN = re.compile(
    r"pattern|layers?$|num_|theta|_rope|freq|chunk_size_feed|mlp|expert|intermediate|groups?$|_idx|_dim"
)
_FEED_FORWARD = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size|^d_ff$|^dff$|^dim_ff$|n_inner|share_expert_dim")
_EXPERTS = re.compile(r"^(n_routed_|num_|num_local_|moe_num_|n_)experts$")
_CHOSEN = re.compile(r"experts_per_tok|^moe_topk$|^moe_k$|^top_k$|^moe_top_k$|num_selected_experts")
_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_group|n_expert_groups)$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_target_positions)$"
)
_DEPTH = re.compile(r"^(num_hidden_layers|depth|num_layers|n_layers?|layers|encoder_layers|num_encoder_layers)$")


def small_config(config: Any, layers: list[int], narrow: bool = True) -> Any:
    """A copy of `config` whose text decoder has these of its layers, in this order, and small sizes.

    narrow: with fewer heads too; what else is narrow hangs on them.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    for part in _parts(small):
        part.__dict__.pop("quantization_config", None)
        if part is not text:
            _shrink_tower(part)
    _cut(text, layers)
    _shrink(text, text, narrow)
    for part in _parts(small):
        _tokens(part)
    return small


def small_model(model: PreTrainedModel, layers: list[int], seed: int = 0, narrow: bool = True) -> PreTrainedModel:
    """A random model of the class and the configuration of `model`, made small, in evaluation mode.

    Its attention is eager: the definition, which leaves nothing out. torch's own random state is kept.
    """
    config = small_config(model.config, layers, narrow)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        with _Undrawn():
            small = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
        _draw(small)
    return small.eval()


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _cut(text: Any, layers: list[int]) -> None:
    """Leave these layers: lists with an entry per layer, the number of layers, and where a first kind of layer ends."""
    n = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == n and not name.startswith("_"):
            setattr(text, name, type(value)(value[layer] for layer in layers))
        elif re.search(r"first_k_dense_replace|max_window_layers|num_dense_layers|start_index", name) and value:
            setattr(text, name, sum(layer < value for layer in layers))
        elif re.search(r"end_index", name) and value:
            setattr(text, name, len(layers))
    text.num_hidden_layers = len(layers)


def _shrink(config: Any, text: Any, narrow: bool) -> None:
    heads = getattr(text, "num_attention_heads", None) or 0
    hidden = getattr(text, "hidden_size", None) or 0
    width = getattr(text, "head_dim", None) or (hidden // heads if heads else 0)
    fewer = narrow and heads > HEADS and width > 0
    slim = min(hidden, HEADS * width)
    for name, value in list(_numbers(config)):
        if _FEED_FORWARD.search(name):
            new = min(value, FEED_FORWARD)
        elif _EXPERTS.search(name):
            new = min(value, EXPERTS)
        elif _CHOSEN.search(name):
            new = min(value, EXPERTS // 2)
        elif _GROUPS.search(name):
            new = min(value, 1)
        elif _SPAN.search(name) and not _NO_SPAN.search(name):
            new = min(value, SPAN)
        elif name.endswith("vocab_size") or name.startswith("vocab_size"):
            new = min(value, VOCAB)
        elif _POSITIONS.search(name):
            new = min(value, POSITIONS)
        elif fewer and _HEADS.search(name):
            new = _fewer(value, heads)
        elif fewer and value == hidden and re.search("hidden|dim|size|d_model|n_embd|width", name):
            new = slim
        else:
            continue
        if new != value:
            setattr(config, name, new)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := getattr(config, name, None), dict):
            setattr(config, name, _early(rope, config))
    for value in list(vars(config).values()):  # settings of a part, as in dbrx and mpt
        if hasattr(value, "__dict__") and hasattr(value, "to_dict") and value not in list(_parts(config)):
            _shrink(value, text, narrow)


def _shrink_tower(part: Any) -> None:
    """What is no text decoder never runs: one layer, and a vocabulary that does not weigh."""
    for name, value in list(_numbers(part)):
        if _DEPTH.search(name):
            setattr(part, name, min(value, 1))


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
            yield name, value


def _fewer(value: int, heads: int) -> int:
    """So many heads in the small model: as many as before against the others, roughly."""
    if value == heads:
        return HEADS
    return min(value, 1 if value <= 1 else 2 * HEADS if value > heads else HEADS // 2)


def _early(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Settings of RoPE that reach longer texts early.

    Where frequencies follow the length, lengths.py keeps a sequence on one side of the switch: here below it.
    """
    if re.search("dynamic|longrope", str(rope.get("rope_type", rope.get("type")))):
        return dict(rope)
    out = {key: _early(value, config) if isinstance(value, Mapping) else value for key, value in rope.items()}
    if "original_max_position_embeddings" in out:
        out["original_max_position_embeddings"] = SPAN
    return out


def _tokens(config: Any) -> None:
    """Special tokens inside the small vocabulary, and outside of what texts are made of."""
    for at, (name, value) in enumerate(sorted(vars(config).items())):
        if _TOKEN.search(name) and isinstance(value, int) and not isinstance(value, bool) and value >= FIRST_WORD:
            setattr(config, name, at % FIRST_WORD)
        elif _TOKEN.search(name) and isinstance(value, list) and any(isinstance(v, int) and v >= VOCAB for v in value):
            setattr(config, name, [min(v, 2) for v in value])


class _Undrawn(TorchFunctionMode):
    """Leaves matrices as they lie in memory instead of drawing them: `_draw` does, once, and towers are never run."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        weight = args[0] if args else (kwargs or {}).get("tensor")
        name = getattr(func, "__name__", "")
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and re.search("(normal|uniform|orthogonal)_$", name):
            return weight
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _draw(model: PreTrainedModel) -> None:
    """Weights so large that attention matters: a model fresh from its own initialisation attends evenly."""
    in_decoder = {id(weight) for weight in model.get_decoder().parameters()}
    for weight in model.parameters():
        if weight.numel() > MOST and id(weight) not in in_decoder:
            continue  # as it lies in memory: never read
        if weight.dim() > 1:
            weight.normal_(0, weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
