"""The contract between a method, the model it runs under, and everything that measures it.

A `Method` holds hyperparameters and builds one `LayerCache` per layer. A layer's turn in a forward pass is one `Step`:
`append` brings the new keys and values in, `attend` gives the output, `end_step` compresses. Only `attend` needs the
model's output to go on, so several caches can be filled from one model pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kernels import Rules, rotate
from methods.core.budget import check_budget
from methods.core.errors import UserError
from methods.core.home.old_names import adopt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods.core.artefacts import Calibration
    from methods.core.cache import KVCache


class Stage(Enum):
    """Where a step stands in its sequence."""

    MID_PROMPT = "mid_prompt"  # more of the prompt follows
    ENDS_PROMPT = "ends_prompt"
    TURN = "turn"  # more than one token after the prompt: a question, a later turn
    DECODE = "decode"


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer, for turning stored keys and for undoing the turn.

    inv_freq: radians per position of each pair, [R / 2], where R <= D channels are rotated; negative where the layer
    turns the other way, and none in a layer that leaves its keys as they are.
    interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
    """

    inv_freq: Tensor
    interleaved: bool = False

    def rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        """x [..., D] turned forward by delta [...] positions; the channels beyond R stay."""
        if len(self.inv_freq) == 0:
            return x
        angle = delta[..., None].float() * self.inv_freq.to(x.device)  # [..., R / 2]
        return rotate(x, angle.cos(), angle.sin(), self.interleaved)


@dataclass(frozen=True)
class ModelSpec:
    """What a method may know of the model before the first step."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    #: one per layer, found by turning keys as the layer does; None where nothing turns them so at every length, or
    #: where the model's positions are not RoPE's
    ropes: Sequence[Rope | None]
    alibi: bool = False
    prepared: Any = None  # what the method's `prepare` returned for this model


@dataclass
class Step:
    """One pass through one layer: everything a method may look at.

    q [B, Hq, T, D], k [B, H, T, D], v [B, H, T, Dv]: after RoPE, as the model would attend with them.
    pos [B, T]: the tokens' positions in their own row, int32, -1 for padding.
    padded: whether any token of this step is padding.  seen: tokens per row before this step, [B], int32.
    samples [B]: numbers that identify the rows' samples, for keyed randomness.
    hidden [B, T, M]: input of the attention block.  turned: whether RoPE turned k.  cos, sin [B or 1, T, R / 2]: where
    it did, the rotary factors of its pairs, a scaled RoPE's multiplier included.  interleaved: as in Rope. All of these
    only for methods that ask (`Method.needs`).
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
    memo: dict[Any, Tensor] = field(default_factory=dict)

    @cached_property
    def k_raw(self) -> Tensor:
        """Keys before RoPE, [B, H, T, D]: k turned back by the layer's own cos and sin; k itself without RoPE.

        Raises UserError for a method that does not ask for "rope".
        """
        if self.turned is None:
            raise UserError('Step.k_raw: only for a method whose `needs` names "rope"')
        if self.cos is None or self.sin is None:
            return self.k
        cos, sin = self.cos[:, None].float(), self.sin[:, None].float()  # [B or 1, 1, T, R / 2]
        scale = cos.square() + sin.square()  # above 1 where a scaled RoPE multiplies keys
        return rotate(self.k, cos / scale, -sin / scale, self.interleaved)

    def rows(self, rows: slice) -> Step:
        """The same step for some rows of the batch, as views."""
        cut = {
            f.name: value[rows]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.shape[0] == self.q.shape[0]
        }
        return dataclasses.replace(self, **cut, memo={})


@dataclass
class Holding:
    """What a layer holds, in bytes by row of its batch: what a row holds alone, whatever the others are.

    held: by the row's slots: keys, values or codes, positions, side arrays, unused places of pages.
    beside: what of it is documented on top of the budget, all but keys and values.
    padding: of places that are no slot of the row: those that make the rows of a rectangle equally long, those of slots
        that no later query sees, and free ones for tokens to come.
    alike: of it, what a row that has dropped nothing takes to lie as the rows beside it do; empty: nothing.
    """

    held: list[int]
    beside: list[int]
    padding: list[int]
    alike: list[int] = field(default_factory=list)

    def overhead(self) -> int:
        """Bytes beside keys and values, of all rows."""
        return sum(self.beside) + sum(self.padding)


class LayerCache:
    """What one layer stores between steps, and how it is attended to."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt(
            cls,
            {
                "take": "append",
                "settle": "end_step",
                "asked": "budget_bytes",
                "touched": "read_tensors",
                "own": "held_bytes",
            },
        )

    def append(self, step: Step) -> None:
        """Bring in the step's keys and values and the statistics that need no output."""
        raise NotImplementedError

    def attend(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv] of the step's queries over what is held, the step itself included."""
        raise NotImplementedError

    def end_step(self, step: Step) -> None:
        """End of the layer's turn: drop, pack, merge, spill; nothing unless overridden."""

    def tensors(self) -> Iterable[Tensor]:
        """Everything held between steps, each tensor once; `meter.py` counts their storages."""
        raise NotImplementedError

    def read_tensors(self) -> Iterable[Tensor]:
        """What the last decode step read; all of it unless a sparse method says otherwise."""
        return self.tensors()

    def workspace(self) -> Iterable[Tensor]:
        """What is held only until the prompt has ended, such as queries that will score."""
        return ()

    def adapters(self) -> Iterable[Tensor]:
        """Parameters that come with the method and not with the sequence: filters, codebooks, weights."""
        return ()

    def holding(self) -> Holding | None:
        """`tensors` by row; None: every row holds the same. May make the host wait, but not after a decode step."""
        return None

    def held_bytes(self) -> list[int] | None:
        """What `holding` gives as held, which is asked for after every pass."""
        holding = self.holding()
        return None if holding is None else holding.held

    def overhead(self) -> int:
        """Bytes that the method documents on top of its budget: positions, side arrays, free places for new tokens."""
        holding = self.holding()
        return 0 if holding is None else holding.overhead()

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """Bytes of keys and values that the budget allows each row at the end of the prompt.

        full: those of the full cache. A floor that the method holds on to is no part of the request.
        """
        return list(full)

    def expect(self, new: int) -> None:
        """So many tokens will come one at a time from here: there need be no free places for more."""

    def nominal_bits(self) -> Sequence[float] | None:
        """Of each row, bits of a number's code, scales and what is not packed left out; None: numbers are not coded."""
        return None

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from row rows[i]: beam search. rows [B], long."""
        raise NotImplementedError(f"{type(self).__name__}: rows of this cache cannot be reordered")


@dataclass(frozen=True)
class Shape:
    """What plans know of a model before it is loaded. itemsize: bytes per number of its keys and values."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    itemsize: int


@dataclass
class Method:
    """Hyperparameters of one system; unchanged while running, all state lives in the caches.

    budget: share of the prompt's slots in (0, 1], or a whole number of slots above 1.
    seed: of everything random in the method.
    """

    budget: float | int = 1.0
    seed: int = 0

    #: saves no real memory; drawn hollow and left out of memory and speed frontiers
    simulated: ClassVar[bool] = False
    #: extra fields of Step to fill in: "hidden", "rope"
    needs: ClassVar[frozenset[str]] = frozenset()
    #: changes the prompt's own hidden states, so the cell cannot share a prompt pass
    changes_prompt: ClassVar[bool] = False
    #: its `prepare` changes the model itself, so that no other cell may use the same one
    edits_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.budget = check_budget(self.budget)

    @property
    def name(self) -> str:
        """The name of the method's YAML; the class name in lower case when there is none."""
        return getattr(self, "_name", type(self).__name__.lower())

    @property
    def family(self) -> str:
        """What kind of method it is, for figures: "eviction", "quantization", "mixed", "trained" and so on."""
        return "other"

    def config(self) -> dict[str, Any]:
        """All knobs as plain values, for the record."""
        return dataclasses.asdict(self)

    def prepare(self, model: PreTrainedModel) -> Any:
        """Load an artefact, once per model; what it returns reaches `caches` as spec.prepared.

        A method that edits weights here says so with `edits_model`; one that does not and edits them is refused.
        """

    def calibrate(self, model: PreTrainedModel, rows: Sequence[Tensor], seed: int, **options: Any) -> Calibration:
        """What `runner=calibrate` saves for `prepare` to load, from rows of token ids [1, T] run through the model.

        options: the method's own, `runner.options` on the command line.  Raises UserError if it needs none.
        """
        raise UserError(f"method={self.name}: needs no calibration")

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        """One LayerCache per layer for one batch; prompt_len: padded length of a prompt that comes in chunks."""
        raise NotImplementedError

    def planned_share(self, tokens: int, spec: Shape) -> float:
        """For plans: what a row of so many tokens will hold when its prompt has ended, as a share of a full cache."""
        return float(self.budget) if self.budget <= 1 else min(1.0, self.budget / max(1, tokens))

    def after_prompt(self, model: PreTrainedModel, cache: KVCache) -> None:
        """For methods that run the model again once the prompt is in; called by the runner, not by `generate()`."""

    def cache_for(
        self, model: PreTrainedModel, prompt_len: int | None = None, samples: Sequence[int] | None = None
    ) -> KVCache:
        """A transformers Cache for `model`, one sequence batch long; binds the model on first use.

        prompt_len: padded tokens of a prompt that comes in several forwards; None: the first forward is the prompt.
        samples: one number per row, keys of the method's randomness; None: 0, 1, 2, ...
        Raises UserError when the model's architecture cannot be bound.
        """
        from methods.core.bind import cache_for  # at call time: binding needs this contract

        return cache_for(model, self, prompt_len=prompt_len, samples=samples)
