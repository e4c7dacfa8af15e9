"""One layer of our cache as transformers sees it, and where a pass through all of them stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kernels import Rules
from methods.core.binding.decoder import CannotBind
from methods.core.binding.padding import columns, put_back
from methods.core.contract import LayerCache, Stage, Step

if TYPE_CHECKING:
    from methods.core.cache import KVCache


@dataclass
class Handle:
    """New keys and values on their way through the model; deliberately not a tensor."""

    layer: KVLayer
    k: Tensor
    v: Tensor


class KVLayer(CacheLayerMixin):
    """One layer of a KVCache, as transformers sees it."""

    is_sliding = False

    def __init__(self, cache: KVCache, index: int, inner: LayerCache):
        super().__init__()
        self.cache, self.index, self.inner = cache, index, inner
        self.seen = 0  # columns of the batch, padding included
        self.extras: dict[str, Any] = {}  # what the method asked for of the current step
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the stores see their first tensors in `append`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, None]:
        self.cache.need_own_pass()
        spec, shape = self.cache.spec, tuple(key_states.shape)
        if len(shape) != 4 or (shape[1], shape[3]) != (spec.n_kv_heads, spec.head_dim):
            raise CannotBind(
                self.cache.kind,
                "it stores something other than its heads' keys and values, such as latents "
                f"({' x '.join(map(str, shape[1::2]))} numbers per token, not {spec.n_kv_heads} x {spec.head_dim})",
            )
        self.seen += shape[2]
        return Handle(self, key_states, value_states), None

    def get_seq_length(self) -> int:
        """Tokens seen, not slots stored: positions never come from a stored length."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise NotImplementedError("a compressed cache stays on its device")

    prefetch = offload

    def reset(self) -> None:
        raise NotImplementedError("a new sequence needs a new cache: method.cache_for(model)")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("layers are cropped together, by KVCache.crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.reorder(beam_idx)

    def attend(self, handle: Handle, q: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
        """Output [B, Hq, T, Dv] of the step: append, attend, end the step, and let the meter look."""
        cache = self.cache
        here, given = cache.pass_state(self, q, mask), q.dtype
        q, k, v = cache.rounding(self.index, q, handle.k, handle.v)
        step = Step(
            layer=self.index, n_layers=len(cache.layers), stage=here.stage, q=q, k=k, v=v, pos=here.pos,
            seen=here.seen, padded=here.padded, samples=cache.samples, rules=rules, rope=cache.spec.ropes[self.index],
            prompt_len=here.prompt, ids=here.ids, spans=cache.spans, **self.extras,
        )  # fmt: skip
        self.extras = {}
        if here.order is not None:
            step = columns(step, here.order)
        try:
            out = self._probed(step) if step.stage is Stage.PROBE else self._taken_in(step)
        except FloatingPointError:
            cache.rounding.end_pass(wait=True)  # a number that was too large comes to NaN in what is made of it
            raise
        if self.index == len(cache.layers) - 1:
            cache.rounding.end_pass(wait=step.stage is not Stage.DECODE)
        out = out.to(given)
        return out if here.order is None else put_back(out, here.order)

    def _taken_in(self, step: Step) -> Tensor:
        cache = self.cache
        with cache.meter.reading(step):
            self.inner.append(step)
            cache.meter.after_append(step)
            out = self.inner.attend(step)
            self.inner.end_step(step)
        if self.index == len(cache.layers) - 1:
            cache.end_pass(step)
        cache.meter.after_end_step(step)
        return out

    def _probed(self, step: Step) -> Tensor:
        out = self.inner.probe(step)
        self.cache.meter.look(step)
        if self.index == len(self.cache.layers) - 1:
            self.cache.end_pass(step)
        return out


@dataclass
class PassState:
    """Where one forward pass stands, the same for all its layers."""

    total: int  # columns seen, this pass included
    stage: Stage
    pos: Tensor  # [B, T]
    seen: Tensor  # [B], tokens per row before this pass
    padded: bool
    order: Tensor | None = None  # [B, T], of the columns as a step has them; None: as they came
    ids: Tensor | None = None  # [B, T], in that order, where the method asks for them
    prompt: Tensor | None = None  # [B], tokens of each row's prompt; -1: not known yet
