"""How many bytes a group of caches will take, before it takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from methods.core.contract import Method, Shape

if TYPE_CHECKING:
    import torch


class Size:
    """Bytes of caches for a model with this configuration."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype):
        heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1
        kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
        width = config.get("head_dim") or (
            (config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0) // heads
        )
        layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers") or 1
        self.shape = Shape(layers, kv_heads, width, dtype.itemsize)
        #: keys and values of one token in all layers
        self.token = 2 * layers * kv_heads * width * dtype.itemsize
        self.vocabulary, self.itemsize = config.get("vocab_size") or 0, dtype.itemsize

    def prompt(self, tokens: int, rows: int) -> int:
        """What the shared pass over a prompt holds beside the members: the layer it is in, at most a full cache."""
        return tokens * rows * self.token

    def logits(self, tokens: int, rows: int) -> int:
        """What the logits of a pass take, single precision beside the model's own."""
        return tokens * rows * self.vocabulary * (4 + self.itemsize)

    def member(self, method: Method, tokens: int, new: int, rows: int, chunked: bool) -> int:
        """What one member holds at most: the share that it plans; all of a prompt that comes in chunks."""
        share = method.planned_share(tokens, self.shape)
        return int((tokens * (1 if chunked else share) + new) * rows * self.token)


def device_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
