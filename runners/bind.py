"""Puts LayerCaches under a transformers model; the only file that knows attention modules.

The model's attention calls `cache.update`, which returns a handle instead of tensors; the handle travels through the
model to the attention function registered here, which lets the layer's cache take in the step and answer it. A stock
attention function that meets the handle fails loudly; calls without one of our caches meet the untouched model.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kernels import Rules
from methods.core.contract import LayerCache, Method, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.full import Full
from runners import sight
from runners.decoder import CannotBind, Decoder, decoder_of, drops_attention
from runners.lengths import Lengths, Reach
from runners.meter import Meter, Report
from runners.padding import columns, padding_first, put_back
from runners.passes import Bound, Passes
from runners.rotation import Turning, turnings
from runners.self_check import CHECK, self_check

NAME = "kvfrontier"


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
        """Nothing to do: the stores see their first tensors in `take`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, None]:
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
        raise NotImplementedError(
            "tokens cannot be taken back from a compressed cache; assisted generation is not for it"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.reorder(beam_idx)

    def attend(self, handle: Handle, q: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
        """Output [B, Hq, T, Dv] of the step: take in, attend, settle, and let the meter look."""
        cache = self.cache
        here = cache.standing(self, q, mask)
        step = Step(
            layer=self.index, n_layers=len(cache.layers), stage=here.stage, q=q, k=handle.k, v=handle.v, pos=here.pos,
            seen=here.seen, padded=here.padded, samples=cache.samples, rules=rules, rope=cache.spec.ropes[self.index],
            **self.extras,
        )  # fmt: skip
        self.extras = {}
        if here.order is not None:
            step = columns(step, here.order)
        self.inner.take(step)
        cache.meter.after_take(step)
        out = self.inner.attend(step)
        self.inner.settle(step)
        cache.meter.after_settle(step)
        return out if here.order is None else put_back(out, here.order)


@dataclass
class Standing:
    """Where one forward pass stands, the same for all its layers."""

    total: int  # columns seen, this pass included
    stage: Stage
    pos: Tensor  # [B, T]
    seen: Tensor  # [B], tokens per row before this pass
    padded: bool
    order: Tensor | None = None  # [B, T], of the columns as a step has them; None: as they came


class KVCache(Bound):
    """A transformers Cache whose layers belong to a method; made by `Method.cache_for`."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        prompt_len: int | None = None,
        samples: Sequence[int] | None = None,
    ):
        spec = bind(model)
        self.kind: str = model.__dict__["_kvfrontier"]["kind"]
        self.turnings: list[Turning] = model.__dict__["_kvfrontier"]["turnings"]
        unknown = [i for i, turning in enumerate(self.turnings) if not turning.known]
        if "rope" in method.needs and unknown:
            raise UserError(f"{method.name}: needs keys as they are before RoPE, and how layer {unknown[0]} of "
                            f"{spec.name} turns them is not known")  # fmt: skip
        prepared = model.__dict__.setdefault("_kvfrontier_prepared", Prepared())
        self.spec = dataclasses.replace(spec, prepared=prepared.by(method, model))
        self.method, self.prompt_len = method, prompt_len
        self.reach: Reach | None = None  # where frequencies follow the length
        self._samples = samples
        self._here: Standing | None = None
        self._counts: Tensor | None = None  # [B], tokens per row so far
        self._again = False
        inner = method.caches(self.spec, prompt_len)
        super().__init__(layers=[KVLayer(self, i, layer) for i, layer in enumerate(inner)])
        self.meter = Meter(inner)

    @property
    def samples(self) -> Tensor:
        assert self._here is not None
        if not isinstance(self._samples, Tensor):
            B, device = self._here.pos.shape[0], self._here.pos.device
            numbers = list(self._samples) if self._samples is not None else list(range(B))
            if len(numbers) != B:
                raise UserError(f"samples: {len(numbers)} numbers for a batch of {B} rows; give one per row")
            self._samples = torch.tensor(numbers, device=device)
        return self._samples

    def standing(self, layer: KVLayer, q: Tensor, mask: Tensor | None) -> Standing:
        """The pass that `layer` is in; worked out by the first layer that meets it."""
        if self._here is None or layer.seen > self._here.total:
            self._here = self._stand(layer.seen, q, mask)
        return self._here

    def _stand(self, total: int, q: Tensor, mask: Tensor | None) -> Standing:
        B, _, T, _ = q.shape
        before = total - T
        if self.prompt_len is None:
            self.prompt_len = total
        if before < self.prompt_len:
            stage = Stage.MID_PROMPT if total < self.prompt_len else Stage.ENDS_PROMPT
        elif self._again:
            stage, self._again = Stage.ENDS_PROMPT, False
        else:
            stage = Stage.DECODE if T == 1 else Stage.TURN
        if self._counts is None:
            self._counts = torch.zeros(B, dtype=torch.int32, device=q.device)
        seen = self._counts
        real = None
        # a decoded token is never padding, so that no device is waited for
        if mask is not None and stage is not Stage.DECODE:
            real = mask[:, total - T : total].bool()
            real = None if bool(real.all()) else real
        if real is None:
            pos = seen[:, None] + torch.arange(T, dtype=torch.int32, device=q.device)
            self._counts = seen + T
        else:
            running = real.cumsum(-1, dtype=torch.int32)
            pos = torch.where(real, seen[:, None] + running - 1, -1)
            self._counts = seen + running[:, -1]
        order = None if real is None else padding_first(real)
        if stage is Stage.MID_PROMPT or (stage is Stage.ENDS_PROMPT and 0 < before < self.prompt_len):
            self._refuse_gaps(real, order, seen)
        if order is not None:
            pos = pos.gather(1, order)
        return Standing(total, stage, pos, seen, real is not None, order)

    def _refuse_gaps(self, real: Tensor | None, order: Tensor | None, seen: Tensor) -> None:
        """Raises UserError where a prompt in pieces has padding behind tokens: what decides may lie a piece back."""
        if real is not None and (order is not None or bool(((seen > 0) & ~real.all(-1)).any())):
            raise UserError(
                f"attention_mask: a row of a prompt that comes in pieces (prompt_len={self.prompt_len}) has padding "
                "behind its tokens; pad it on the left, or give the prompt in one piece"
            )

    def go_on_from(self, other: KVCache, rows: Tensor | None = None) -> None:
        """Stand where `other` stands, which saw the same tokens; what the layers hold is the caller's business.

        rows [B], long: which row of `other` each row goes on from; None: the same.
        """
        assert other._counts is not None and isinstance(other._samples, Tensor), "the other has seen nothing yet"
        self.prompt_len, self._here, self.reach = other.prompt_len, other._here, other.reach
        self._counts = other._counts if rows is None else other._counts[rows]
        self._samples = other._samples if rows is None else other._samples[rows]
        for own, its in zip(self.layers, other.layers, strict=True):
            own.seen = its.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.meter.reorder(beam_idx)
        if self._counts is not None:
            self._counts = self._counts[beam_idx.to(self._counts.device)]
        if isinstance(self._samples, Tensor):
            self._samples = self._samples[beam_idx.to(self._samples.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows only, given by number or as a mask over the rows."""
        self.reorder_cache(torch.arange(self._rows())[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row so many times, side by side; the copies count as the same sample."""
        self.reorder_cache(torch.arange(self._rows()).repeat_interleave(repeats))

    def _rows(self) -> int:
        if self._counts is None:
            raise RuntimeError("this cache has no rows yet: it has seen no token")
        return len(self._counts)

    def compress_next(self) -> None:
        """The next forward ends a prompt, as the first one did: what is stored then is compressed again."""
        self._again = True

    def fork(self) -> KVCache:
        """A copy that goes on by itself; what belongs to the method or the model is shared, not copied."""
        return copy.deepcopy(self, {id(one): one for one in self.lent()})

    def lent(self) -> list[Any]:
        """What is the method's or the model's, and not this sequence's."""
        adapters = (tensor for layer in self.layers for tensor in layer.inner.adapters())
        lent = (self.method, self.spec, self.turnings, self.spec.__dict__.get("prepared"), *adapters)
        return [one for one in lent if one is not None]

    def expect(self, new: int) -> None:
        """So many tokens will be decoded from here: no room is made for more. Without it room grows by an eighth."""
        for layer in self.layers:
            layer.inner.expect(new)

    def report(self) -> Report:
        """Bytes held, read and spent so far, of all rows together; see runners/meter.py.

        Raises UserError while the prompt that was announced has not come whole, when nothing has been compressed.
        """
        self._refuse_half_a_prompt()
        return self.meter.report()

    def reports(self, behind: Sequence[int] | None = None) -> list[Report]:
        """The same of every row; behind: passes that each was fed after its own last one, which do not count."""
        self._refuse_half_a_prompt()
        return self.meter.reports(behind)

    def _refuse_half_a_prompt(self) -> None:
        come = self.layers[-1].seen
        if self.prompt_len is not None and come < self.prompt_len:
            raise UserError(
                f"prompt_len={self.prompt_len}: only {come} tokens have come, so that the prompt has not ended and "
                f"nothing has been compressed; prompt_len is the prompt's own length, such as prompt_len={come}, and "
                "may be left out where the prompt comes in one piece"
            )

    def check_budget(self) -> None:
        """Raises BudgetMiss when the prompt's end left more of a row than its budget and documented overhead."""
        self._refuse_half_a_prompt()
        self.meter.check_budget(self.method.name)


class Prepared:
    """What methods have made of a model in `prepare`, each for as long as the method lives."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[weakref.ref[Method], Any]] = {}

    def by(self, method: Method, model: PreTrainedModel) -> Any:
        """What this very method made, which it does once: one with the same knobs may edit the model otherwise."""
        key = id(method)
        if key not in self.made or self.made[key][0]() is not method:
            made = self.made
            self.made[key] = (weakref.ref(method, lambda gone: made.pop(key, None)), method.prepare(model))
        return self.made[key][1]

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()  # a copy of the model, or one from a file, knows no method yet


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


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sight.mask)


def bind(model: PreTrainedModel, check: bool = True) -> ModelSpec:
    """Let `model` run on our caches; the second call does nothing. Returns what methods may know of it.

    check: try out a small copy first, unless the model was loaded with model.check=off; see runners/self_check.py.

    Raises UserError with the architecture's name when its attention cannot be reached or would not be the model's own;
    the model is left as it was.
    """
    state = model.__dict__.get("_kvfrontier")
    if state is None:
        decoder = decoder_of(model, ADAPTERS)
        _need_whole_attention(decoder.config.model_type, decoder.modules)
        if check and model.__dict__.get(CHECK, True):
            self_check(model, decoder, full, ADAPTERS)
        state = _attach(model, decoder)
        model.__dict__["_kvfrontier"] = state
    _need_whole_attention(state["kind"], state["modules"])
    return state[NAME]


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
    return {NAME: spec, "turnings": turned, "kind": kind, "modules": modules, "passes": passes}


def _need_whole_attention(kind: str, modules: Iterable[nn.Module]) -> None:
    """Raises CannotBind where the model would leave attention out at random."""
    if any(map(drops_attention, modules)):
        raise CannotBind(kind, "in training mode it drops attention at random; model.eval() does not")


@contextmanager
def unbound(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model with its own attention inside the block, whatever cache it is given."""
    state = model.__dict__.get("_kvfrontier")
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


def n_kv_heads(config: Any) -> int:
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
