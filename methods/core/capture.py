"""Every layer's step of one pass through the untouched model: what calibrations learn from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import attend
from methods.core.contract import LayerCache, Method, ModelSpec, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def capture_steps(model: "PreTrainedModel", ids: Tensor) -> list[Step]:
    """The steps of all layers, in order, while the model reads rows of token ids [B, T] that hold no padding.

    Queries, keys and values are the ones that the model attends with, all of the pass at once: L x B x (Hq + 2 H) x T
    x D numbers on the model's device.
    """
    cache = Capture().cache_for(model)
    model(ids.to(model.device), past_key_values=cache, use_cache=True)
    return [layer.inner.step for layer in cache.layers]


@torch.no_grad()
def capture_blocks(model: "PreTrainedModel", ids: Tensor) -> list[tuple[Step, Tensor]]:
    """The same with what each block was given, and the output [B, Hq, T, Dv] of its attention."""
    cache = CaptureBlocks().cache_for(model)
    model(ids.to(model.device), past_key_values=cache, use_cache=True)
    return [(layer.inner.step, layer.inner.out) for layer in cache.layers]


class Capture(Method):
    """Keeps nothing but the step itself."""

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [CapturedLayer() for _ in range(spec.n_layers)]


class CaptureBlocks(Capture):
    """Keeps what there is to know of a step."""

    needs = frozenset({"hidden", "rope"})


class CapturedLayer(LayerCache):
    """One layer's only step."""

    step: Step | None = None
    out: Tensor | None = None

    def append(self, step: Step) -> None:
        self.step = step

    def attend(self, step: Step) -> Tensor:
        pos = step.pos[:, None].expand(-1, step.k.shape[1], -1)
        self.out = attend(step.q, step.k, step.v, step.rules, q_pos=step.pos, k_pos=pos, layout="causal")
        return self.out

    def tensors(self) -> Iterable[Tensor]:
        return () if self.step is None else (self.step.k, self.step.v)
