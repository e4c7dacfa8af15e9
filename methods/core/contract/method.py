"""Hyperparameters of one system, and what it makes of them for a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from methods.core.binding.rounding import cache_dtype
from methods.core.budget import Budget, check_budget
from methods.core.contract.layer import LayerCache
from methods.core.contract.spec import ModelSpec, Shape
from methods.core.contract.step import Step
from methods.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.core.artefacts import Calibration
    from methods.core.cache import KVCache


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
    #: what the budget is a share of: bytes "held" when the prompt has ended, or "read" by each step after it
    binds: ClassVar[str] = "held"
    #: extra fields of Step to fill in, "hidden", "rope", "ids", "spans", of ModelSpec, "vocabulary", and of the cache,
    #: "answers": what the full cache answers, which only a reference row looks ahead at
    needs: ClassVar[frozenset[str]] = frozenset()
    #: compresses a context before the question is known, and must be told where the one ends and the other begins
    needs_split: ClassVar[bool] = False
    #: changes the prompt's own hidden states, so the cell cannot share a prompt pass
    changes_prompt: ClassVar[bool] = False
    #: its `prepare` changes the model itself for good, so that no other cell may use the same one; `edit` needs no such
    edits_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.budget = check_budget(self.budget)

    @property
    def name(self) -> str:
        """The name of the method's YAML; the class name in lower case when there is none."""
        return getattr(self, "_name", type(self).__name__.lower())

    @property
    def request(self) -> Budget:
        """What `budget` asks for: whether it is off, a share or a number of slots is asked here alone."""
        return Budget(self.budget)

    @property
    def without_text(self) -> bool:
        """Whether a run leaves the text out of its prompts: the floor of a question about a text."""
        return False

    @property
    def family(self) -> str:
        """What kind of method it is, for figures: "eviction", "quantization", "mixed", "trained" and so on."""
        return "other"

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The type of numbers in its caches, see `holding_in`; None: as the model makes keys and values."""
        return getattr(self, "_cache_dtype", None)

    def holding_in(self, dtype: str | torch.dtype | None) -> Self:
        """The same method, whose caches hold keys, values and residual windows in this type; codes stay what they are.

        Where it is not the model's, queries and arithmetic are float32. dtype: as for `cache_for`.
        """
        twin = copy.copy(self)
        twin._cache_dtype = cache_dtype(dtype)  # type: ignore[attr-defined]
        return twin

    def config(self) -> dict[str, Any]:
        """All knobs as plain values, for the record."""
        return dataclasses.asdict(self)

    def prepare(self, model: PreTrainedModel) -> Any:
        """Load an artefact, once per model; what it returns reaches `caches` as spec.prepared.

        A method that edits weights here says so with `edits_model`; one that does not and edits them is refused.
        """

    def edit(self, model: nn.Module, prepared: Any) -> AbstractContextManager[None]:
        """The model as this method's passes need it inside the block, and as it was, bit for bit, after it.

        Entered around every pass on a cache of the method, so that other caches and calls meet the untouched model:
        what costs time is made in `prepare`, whose result is given. `binding.edits` replaces parts and leaves out
        projections that are not needed.
        """
        return nullcontext()

    def calibrate(self, model: PreTrainedModel, rows: Sequence[Tensor], seed: int, **options: Any) -> Calibration:
        """What `runner=calibrate` saves for `prepare` to load, from rows of token ids [1, T] run through the model.

        options: the method's own, `runner.options` on the command line.  Raises UserError if it needs none.
        """
        raise UserError(f"method={self.name}: needs no calibration")

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        """One LayerCache per layer for one batch; prompt_len: padded length of a prompt that comes in chunks."""
        raise NotImplementedError

    def end_pass(self, caches: Sequence[LayerCache], step: Step) -> None:
        """After the last layer of every pass: the place to decide over all layers at once; nothing unless overridden.

        caches: of all layers, of these rows alone where a pass has rows of several caches.  step: the last layer's; its
        stage, positions and samples are the whole pass's. What is held is measured afterwards.
        """

    def prompt_chunk(self, n: int) -> int | None:
        """Tokens per pass in which a prompt of n columns is read; None: as it comes.

        Whatever the pieces that a prompt comes in, no pass crosses a multiple of it, counted by each row's own tokens:
        what happens at these belongs in `LayerCache.end_step` of the rows that have reached one.
        """
        return None

    def planned_share(self, tokens: int, spec: Shape) -> float:
        """For plans: what a row of so many tokens will hold when its prompt has ended, as a share of a full cache."""
        if self.binds == "read":  # all is held
            return 1.0
        return self.request.share(tokens)

    def after_prompt(self, model: PreTrainedModel, cache: KVCache) -> None:
        """Once the prompt is in: run the model again over extra tokens, by `cache.probe`, and decide then.

        It runs inside the forward that ends the prompt, also under `generate()`; what is held is measured afterwards.
        """

    def cache_for(
        self,
        model: PreTrainedModel,
        prompt_len: int | None = None,
        samples: Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        spans: Sequence[Mapping[str, tuple[int, int]]] | None = None,
        dtype: str | torch.dtype | None = None,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> KVCache:
        """A transformers Cache for `model`, one sequence batch long; binds the model on first use.

        prompt_len: padded tokens of a prompt that comes in several forwards; None: the first forward is the prompt.
        samples: one number per row, keys of the method's randomness; None: 0, 1, 2, ...
        tokenizer: the model's, for methods that need the vocabulary; remembered with the model.
        spans: of each row the parts of its prompt by name (`SPANS`): the first token and the one behind the last.
        dtype: of the numbers that are held, "auto", "float32", "float16" or "bfloat16"; None: as `cache_dtype` says.
        answers: token ids that the full cache goes on with, of each row, for methods that need them.
        Raises UserError when the model's architecture cannot be bound, or the method needs what is not given.
        """
        from methods.core.bind import cache_for  # at call time: binding needs this contract

        return cache_for(model, self, prompt_len, samples, tokenizer, spans, dtype, answers)
