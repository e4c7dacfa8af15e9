"""One pass through one layer, as a method sees it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from torch import Tensor

from kernels import Rules, rotate
from methods.core.contract.spec import Rope
from methods.core.contract.text import SPANS
from methods.core.errors import UserError


class Stage(Enum):
    """Where a step stands in its sequence."""

    MID_PROMPT = "mid_prompt"  # more of the prompt follows
    ENDS_PROMPT = "ends_prompt"
    TURN = "turn"  # more than one token after the prompt: a question, a later turn
    DECODE = "decode"
    PROBE = "probe"  # extra tokens on top of the cache, which sees them and stores nothing: `KVCache.probe`


@dataclass
class Step:
    """One pass through one layer: everything a method may look at.

    q [B, Hq, T, D], k [B, H, T, D], v [B, H, T, Dv]: after RoPE, as the model would attend with them.
    pos [B, T]: the tokens' positions in their own row, int32, -1 for padding.
    prompt_len [B]: tokens of each row's prompt, also while it comes in chunks, int32; -1 for a row of which nothing but
    padding has come.
    padded: whether any token of this step is padding.  seen: tokens per row before this step, [B], int32.
    samples [B]: numbers that identify the rows' samples, for keyed randomness.
    hidden [B, T, M]: input of the attention block.  turned: whether RoPE turned k.  cos, sin [B or 1, T, R / 2]: where
    it did, the rotary factors of its pairs, a scaled RoPE's multiplier included.  interleaved: as in Rope. All of these
    only for methods that ask (`Method.needs`).
    ids [B, T]: token ids.  spans [B, len(SPANS), 2]: the named parts of the rows, see `span`. Only for those that ask.
    memo: statistics computed once for all caches that append this step.
    """

    layer: int
    n_layers: int
    stage: Stage
    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    seen: Tensor
    padded: bool
    samples: Tensor
    rules: Rules
    rope: Rope | None = None
    hidden: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    turned: bool | None = None
    interleaved: bool = False
    prompt_len: Tensor | None = None
    ids: Tensor | None = None
    spans: Tensor | None = None
    memo: dict[Any, Tensor] = field(default_factory=dict)

    @cached_property
    def k_raw(self) -> Tensor:
        """Keys before RoPE, [B, H, T, D]: k turned back by the layer's own cos and sin; k itself without RoPE.

        Raises UserError for a method that does not ask for "rope".
        """
        return self._raw(self.k, "k_raw")

    @cached_property
    def q_raw(self) -> Tensor:
        """Queries before RoPE, [B, Hq, T, D], as `k_raw`."""
        return self._raw(self.q, "q_raw")

    def _raw(self, x: Tensor, name: str) -> Tensor:
        if self.turned is None:
            raise UserError(f'Step.{name}: only for a method whose `needs` names "rope"')
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[:, None].float(), self.sin[:, None].float()  # [B or 1, 1, T, R / 2]
        scale = cos.square() + sin.square()  # above 1 where a scaled RoPE multiplies what it turns
        return rotate(x, cos / scale, -sin / scale, self.interleaved)

    def span(self, name: str) -> Tensor:
        """First token of this part of every row, and the one behind its last, by the row's own count: [B, 2], int32.

        (-1, -1) for a row without it. Raises UserError for a method that does not ask for "spans".
        """
        if self.spans is None:
            raise UserError('Step.span: only for a method whose `needs` names "spans"')
        return self.spans[:, SPANS.index(name)]

    def token(self, i: int) -> Step:
        """The same step for its token i alone, as views: those before it have been seen."""
        dims = {"q": 2, "k": 2, "v": 2, "pos": 1, "ids": 1, "hidden": 1, "cos": 1, "sin": 1}
        one = {name: x.narrow(dim, i, 1) for name, dim in dims.items() if (x := getattr(self, name)) is not None}
        seen = self.seen + (self.pos[:, :i] >= 0).sum(-1, dtype=self.seen.dtype)
        return dataclasses.replace(self, **one, seen=seen, memo={})

    def rows(self, rows: slice) -> Step:
        """The same step for some rows of the batch, as views."""
        cut = {
            f.name: value[rows]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.shape[0] == self.q.shape[0]
        }
        return dataclasses.replace(self, **cut, memo={})
