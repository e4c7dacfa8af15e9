"""A transformers Cache whose layers belong to a method: where a pass stands, and what each layer takes in of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.core.binding.kv_layer import KVLayer, PassState
from methods.core.binding.lengths import Reach
from methods.core.binding.padding import padding_first
from methods.core.binding.passes import other_model
from methods.core.binding.prepared import spec_for
from methods.core.binding.probed import Probed
from methods.core.binding.rotation import Turning
from methods.core.binding.rounding import Rounding
from methods.core.contract import Method, Stage, Step
from methods.core.errors import UserError
from methods.core.meter import Meter, Report

#: where a bound model keeps what binding noted of it
BINDING = "_kvfrontier"


class KVCache(Probed):
    """A transformers Cache whose layers belong to a method; made by `Method.cache_for`. The model is bound."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        prompt_len: int | None = None,
        samples: Sequence[int] | None = None,
        spans: Tensor | None = None,
        dtype: torch.dtype | None = None,
        answers: Sequence[Sequence[int]] | None = None,
    ):
        """dtype: of the numbers that it holds; None: as the method says, else as the model makes them."""
        binding = model.__dict__[BINDING]
        self.kind: str = binding["kind"]
        self.model = weakref.ref(model)
        self.passes = weakref.ref(binding["passes"])  # weak: a copy of the cache has the same
        self.turnings: list[Turning] = binding["turnings"]
        self.spec = spec_for(method, model, binding, spans, answers)
        self.answers = answers  # of every row, what the full cache goes on with, until the prompt has ended
        self.given_spans = spans  # [B, len(SPANS), 2]
        self._ids: Tensor | None = None  # [B, T] of the pass that goes on, for methods that ask
        self.method, self.prompt_len = method, prompt_len
        self.reach: Reach | None = None  # where frequencies follow the length
        self._samples = samples
        self._here: PassState | None = None
        self._counts: Tensor | None = None  # [B], tokens per row so far
        self._prompt_tokens: Tensor | None = None  # [B], of each row's last prompt
        self._pieces: tuple[bool, int] = False, 0  # of the prompt: was one longer than a token, single ones since then
        self._again = False
        self._probing = False
        self.prompt_ids: list[Tensor] = []  # [B, T] of the prompt's passes, for methods that ask for ids
        self.common: dict[Any, Any] = {}  # what `once` has made for all members of a group
        self.compress_seconds = 0.0  # that `Method.after_prompt` took
        self.rounding = Rounding(dtype or method.cache_dtype, self.spec.n_layers)
        inner = method.caches(self.spec, prompt_len)
        for layer in inner:
            layer.stack = inner
        super().__init__(layers=[KVLayer(self, i, layer) for i, layer in enumerate(inner)])
        self.meter = Meter(inner, method.binds)

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

    def pass_state(self, layer: KVLayer, q: Tensor, mask: Tensor | None) -> PassState:
        """The pass that `layer` is in; worked out by the first layer that meets it."""
        if self._here is None or layer.seen > self._here.total:
            self._here = self._pass_state(layer.seen, q, mask)
        return self._here

    def _pass_state(self, total: int, q: Tensor, mask: Tensor | None) -> PassState:
        B, _, T, _ = q.shape
        before = total - T
        if self.prompt_len is None:
            self.prompt_len = total
        if total < self.prompt_len:
            self._refuse_decoding(before, T)
        if self._probing:
            stage = Stage.PROBE
        elif before < self.prompt_len:
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
        ids = self._ids
        if order is not None:
            pos = pos.gather(1, order)
            ids = None if ids is None else ids.gather(1, order)
        if stage is Stage.MID_PROMPT:  # padding comes before a row's tokens: what is still to come is none
            left = self.prompt_len - total
            self._prompt_tokens = torch.where(self._counts > 0, self._counts + left, -1)
        elif stage is Stage.ENDS_PROMPT:
            self._prompt_tokens = self._counts
        return PassState(total, stage, pos, seen, real is not None, order, ids, self._prompt_tokens)

    @property
    def spans(self) -> Tensor | None:
        """The named parts of the rows, [B, len(SPANS), 2], on the rows' device, where the method asks for them."""
        if self.given_spans is None or "spans" not in self.method.needs:
            return None
        assert self._here is not None
        B = len(self._here.pos)
        if len(self.given_spans) != B:
            raise UserError(f"spans: of {len(self.given_spans)} rows for a batch of {B}; give those of every row")
        self.given_spans = self.given_spans.to(self._here.pos.device)
        return self.given_spans

    def chunk(self, T: int) -> int | None:
        """Tokens per pass in which the method reads a prompt that T new columns belong to; None: as they come."""
        if self._probing or (self.prompt_len is not None and self.get_seq_length() >= self.prompt_len):
            return None
        self.prompt_len = self.prompt_len or T
        return self.method.prompt_chunk(self.prompt_len)

    @property
    def counts(self) -> Tensor | None:  # type: ignore[override]
        """Tokens of each row so far, [B]; None before the first."""
        return self._counts

    def edit(self) -> AbstractContextManager[None]:
        """The model as the method needs it, for a pass."""
        if type(self.method).edit is Method.edit:
            return nullcontext()
        model = self.model()
        assert model is not None, "the model is gone"
        return self.method.edit(model, self.spec.prepared)

    def begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the model is called with. Raises UserError where a method that looks at token ids is given none."""
        if "ids" not in self.method.needs:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(given, Tensor):
            raise UserError(f"{self.method.name}: needs token ids; give the model input_ids instead of inputs_embeds")
        self._ids = given
        if not self._probing and (self.prompt_len is None or self.get_seq_length() < self.prompt_len or self._again):
            self.prompt_ids.append(given)

    def ended_pass(self, model: nn.Module) -> None:
        """The model has done a pass; where it ended a prompt, the method may run it again."""
        if self._here is not None and self._here.stage is Stage.ENDS_PROMPT:
            self.end_prompt(model)

    def _refuse_gaps(self, real: Tensor | None, order: Tensor | None, seen: Tensor) -> None:
        """Raises UserError where a prompt in pieces has padding behind tokens: what decides may lie a piece back."""
        if real is not None and (order is not None or bool(((seen > 0) & ~real.all(-1)).any())):
            raise UserError(
                f"attention_mask: a row of a prompt that comes in pieces (prompt_len={self.prompt_len}) has padding "
                "behind its tokens; pad it on the left, or give the prompt in one piece"
            )

    def _refuse_decoding(self, before: int, T: int) -> None:
        """Raises UserError where tokens come one by one behind longer pieces: what is decoded is no prompt.

        One such token may be a piece of its own.
        """
        longer, single = self._pieces
        self._pieces = (True, 0) if T > 1 else (longer, single + 1)
        if longer and T == 1 and single:
            self._refuse_half_a_prompt(before - single)

    def need_own_pass(self) -> None:
        """Raises UserError unless it is this cache's own model that brings keys, with our attention under it."""
        passes = self.passes()
        if passes is None or passes.outermost is None:
            raise UserError(other_model(self))

    def resume_from(self, other: KVCache, rows: Tensor | None = None) -> None:
        """Stand where `other` stands, which saw the same tokens; what the layers hold is the caller's business.

        rows [B], long: which row of `other` each row goes on from; None: the same.
        """
        assert other._counts is not None and isinstance(other._samples, Tensor), "the other has seen nothing yet"
        self.prompt_len, self._here, self.reach = other.prompt_len, other._here, other.reach
        self.prompt_ids, self.rounding = list(other.prompt_ids), other.rounding
        self._counts = other._counts if rows is None else other._counts[rows]
        prompt = other._prompt_tokens
        self._prompt_tokens = prompt if rows is None or prompt is None else prompt[rows]
        self._samples = other._samples if rows is None else other._samples[rows]
        self.given_spans = (
            other.given_spans
            if rows is None or other.given_spans is None
            else other.given_spans[rows.to(other.given_spans.device)]
        )
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.seen = theirs.seen

    def end_pass(self, step: Step) -> None:
        """All layers have had their turn; step: the last one's."""
        caches = [layer.inner for layer in self.layers]
        self.meter.before_end_pass(step)
        with self.meter.reading(step):
            self.method.end_pass(caches, step)
        for one in caches:
            one.scratch.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for shared in {id(one): one for layer in self.layers for one in layer.inner.shares()}.values():
            shared.reorder(beam_idx)
        self.meter.reorder(beam_idx)
        if self._counts is not None:
            self._counts = self._counts[beam_idx.to(self._counts.device)]
        for name in ("_samples", "given_spans", "_prompt_tokens"):
            if isinstance(one := getattr(self, name), Tensor):
                setattr(self, name, one[beam_idx.to(one.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows only, given by number or as a mask over the rows."""
        self.reorder_cache(self._rows()[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row so many times, side by side; the copies count as the same sample."""
        self.reorder_cache(self._rows().repeat_interleave(repeats))

    def _rows(self) -> Tensor:
        """The rows' numbers, on their own device."""
        if self._counts is None:
            raise RuntimeError("this cache has no rows yet: it has seen no token")
        return torch.arange(len(self._counts), device=self._counts.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest columns back, -tokens_to_remove of them as in transformers, where nothing has been dropped.

        Raises NotImplementedError for a cache that has dropped or packed something, ValueError above 0.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        layers, n = [layer.inner for layer in self.layers], -tokens_to_remove
        if not all(layer.croppable(n) for layer in layers):
            raise NotImplementedError(
                "tokens cannot be taken back from a compressed cache; assisted generation is not for it"
            )
        if n:
            left = [layer.crop(n) for layer in layers]  # the same in all of them
            self._counts, self.meter.tokens, self._here = left[0].to(torch.int32), left[0].tolist(), None
            self.meter.columns -= n
        for layer in self.layers:
            layer.seen -= n

    def compress_next(self) -> None:
        """The next forward ends a prompt, as the first one did: what is stored then is compressed again.

        Raises UserError while the prompt that was announced has not come whole.
        """
        self._refuse_half_a_prompt()
        self._again = True

    def fork(self) -> KVCache:
        """A copy that goes on by itself; what belongs to the method or the model is shared, not copied."""
        return copy.deepcopy(self, {id(one): one for one in self.shared_objects()})

    def shared_objects(self) -> list[Any]:
        """What is the method's or the model's, and not this sequence's."""
        adapters = (tensor for layer in self.layers for tensor in layer.inner.adapters())
        shared_objects = (self.method, self.spec, self.turnings, self.spec.__dict__.get("prepared"), *adapters)
        return [one for one in shared_objects if one is not None]

    def expect(self, new: int) -> None:
        """So many tokens will be decoded from here: no room is made for more. Without it room grows by an eighth.

        Raises UserError while the prompt that was announced has not come whole.
        """
        self._refuse_half_a_prompt()
        for layer in self.layers:
            layer.inner.expect(new)

    def report(self) -> Report:
        """Bytes held, read and spent so far, of all rows together; see methods/core/meter.py.

        Raises UserError while the prompt that was announced has not come whole, when nothing has been compressed, and
        where float16 was to hold a number that it cannot.
        """
        self._refuse_half_a_prompt()
        self.rounding.check()
        return self.meter.report()

    def reports(self, behind: Sequence[int] | None = None) -> list[Report]:
        """The same of every row; behind: passes that each was fed after its own last one, which do not count."""
        self._refuse_half_a_prompt()
        self.rounding.check()
        return self.meter.reports(behind)

    def _refuse_half_a_prompt(self, come: int | None = None) -> None:
        """Raises UserError if fewer tokens have come than the prompt was said to have; come: so many, else all seen."""
        come = self.layers[-1].seen if come is None else come
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
