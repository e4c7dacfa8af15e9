"""What a cache does once its prompt has been read: its method may run the model again, over tokens not stored."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.core.binding.kv_layer import PassState
from methods.core.binding.passes import Bound
from methods.core.contract import Method
from methods.core.meter import Meter


class Probed(Bound):
    """A cache that can be looked at by extra tokens."""

    method: Method
    meter: Meter
    layers: list[Any]  # KVLayers
    _counts: Tensor | None
    _here: PassState | None
    _probing: bool
    prompt_ids: list[Tensor]
    common: dict[Any, Any]
    compress_seconds: float

    def end_prompt(self, model: nn.Module) -> None:
        """The prompt has been read, and the method does what it does once then; the ledger is read afterwards."""
        if type(self.method).after_prompt is Method.after_prompt:
            return
        began = _now(self.spec.device)
        self.method.after_prompt(model, self)
        self.compress_seconds += _now(self.spec.device) - began
        self.prompt_ids, self.common = [], {}
        self.meter.end_prompt()

    def probe(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> None:
        """Run the model over extra tokens on top of what is held: every layer sees them and stores nothing.

        ids [B, T]; mask [B, T]: 0 for padding, None: no padding. Each row's tokens stand behind its own. Layers answer
        by `LayerCache.probe`, and `Method.end_pass` follows, with Stage.PROBE. The cache stands then where it stood.
        """
        assert self._counts is not None, "nothing has been read yet"
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        old = torch.ones(len(ids), self.get_seq_length(), dtype=ids.dtype, device=ids.device)
        positions = (self._counts[:, None] + mask.cumsum(-1) - 1).clamp_min(0)
        decoder = getattr(model, "base_model", model)  # without the head, whose logits nobody asks for
        seen = [layer.seen for layer in self.layers]
        before = {name: getattr(self, name) for name in ("_here", "_counts", "reach", "_ids", "_pieces")}
        named = {"position_ids": positions} if "position_ids" in inspect.signature(decoder.forward).parameters else {}
        self._probing = True
        try:
            decoder(ids, attention_mask=torch.cat((old, mask), dim=1), past_key_values=self, use_cache=True, **named)
        finally:
            self._probing = False
            for layer, n in zip(self.layers, seen, strict=True):
                layer.seen = n
            for name, value in before.items():
                setattr(self, name, value)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for the members of a group, behind the same prompts, that ask by one key."""
        if key not in self.common:
            self.common[key] = make()
        return self.common[key]


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
