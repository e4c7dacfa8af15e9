"""What a GGUF file says of its model, held against what transformers made of it.

transformers takes from a GGUF file the settings and tensors that it has a place for and drops the others without a
word. Where one of these changes the numbers, the model would answer, and be another one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# settings of a configuration, by the keys that a file has them under; the first name that a configuration has counts
_SAME = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("v_head_dim", "head_dim"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
}
# what says nothing about the numbers that the tensors' sizes do not say
_SILENT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual", "attention.causal"}


@dataclass(frozen=True)
class Header:
    """A file's settings and tensors, without their numbers.

    architecture: as the file names it.  settings: its own keys, without the architecture in front; arrays are None.
    tokenizer: those of `tokenizer.ggml`.  tensors: elements of each.  types: elements stored in each type.
    parts: files that the model is split into.
    """

    architecture: str
    settings: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tensors: Mapping[str, int]
    types: Mapping[str, int]
    parts: int = 1

    @property
    def elements(self) -> int:
        """How many numbers all tensors hold."""
        return sum(self.tensors.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of the weights that is stored in each type, the largest first; less than 0.1 % is left out."""
        found = sorted(((n / self.elements, name) for name, n in self.types.items()), reverse=True)
        return {name: round(share, 3) for share, name in found if share >= 1e-3}

    @property
    def dtype(self) -> str:
        """The dtype that holds its weights without a loss: its own where it has one."""
        return {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(self.shares), ""), "float32")


def read(path: Path) -> Header:
    """The header of a file, by the package `gguf`. Raises whatever that does for a file that is none, or is cut."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    said = {name: _value(field) for name, field in reader.fields.items()}
    architecture = str(said["general.architecture"])
    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return Header(
        architecture,
        _below(said, f"{architecture}."),
        _below(said, "tokenizer.ggml."),
        {tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
        types,
        int(said.get("split.count") or 1),
    )


def dropped_settings(header: Header, config: Any) -> list[str]:
    """Settings of the file that the configuration does not have, or has otherwise, as `key=value`."""
    wrong = []
    for key, value in header.settings.items():
        if value is None or key in _SILENT:
            continue
        if key.startswith("rope.scaling."):
            harmless = header.settings.get("rope.scaling.type", "none") == "none"
        elif key == "rope.freq_base":
            harmless = _same(value, _rope(config).get("rope_theta"))
        elif key == "rope.dimension_count":
            share = _rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
            harmless = value == int(share * _head_dim(config))
        else:
            here = [found for name in _SAME.get(key, ()) if (found := _setting(config, name)) is not None]
            harmless = bool(here) and _same(value, here[0])
        if not harmless:
            wrong.append(f"{key}={value}")
    return wrong


def dropped_tensors(header: Header, model: Any) -> list[str]:
    """Tensors of the file that a model has no place for, by their number of elements; none where all are there.

    model: of the file's configuration; without memory (on "meta") is enough.
    """
    held = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    left = header.elements - sum(held.values())
    if left == 0:
        return []
    # an embedding that is the output too is one tensor of the model, whatever a file has of it
    if model.config.get_text_config().tie_word_embeddings and header.tensors.get("output.weight") == left:
        return []
    named = [name for name, n in header.tensors.items() if n == left or "rope" in name]
    return named or [f"{abs(left)} numbers {'more' if left > 0 else 'fewer'} than the model has"]


def _value(field: Any) -> Any:
    """A setting's value; None for an array, of which nothing here is asked."""
    if len(field.types) != 1:
        return None
    part = field.parts[field.data[0]]
    if field.types[0].name == "STRING":
        return bytes(part).decode("utf-8", "replace")
    return part[0].item()


def _below(said: Mapping[str, Any], above: str) -> dict[str, Any]:
    return {name.removeprefix(above): value for name, value in said.items() if name.startswith(above)}


def _rope(config: Any) -> Mapping[str, Any]:
    """Settings of RoPE; where layers differ, those of the layers that see everything, which is what files hold."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _setting(config: Any, name: str) -> Any:
    return _head_dim(config) if name == "head_dim" else getattr(config, name, None)


def _same(a: Any, b: Any) -> bool:
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-5)  # a file's numbers are float32
    except (TypeError, ValueError):
        return False


def told_shares(shares: Mapping[str, float]) -> str:
    """Types with their shares, as a line of text has them; less than half a percent is not said."""
    seen = {name: share for name, share in shares.items() if share >= 5e-3}
    return ", ".join(f"{name} {share:.0%}" for name, share in seen.items()) if len(seen) > 1 else "".join(seen)
