"""The full cache: keeps everything in full precision, the reference point of every plot.

Paper: none; this is the model as its authors run it.
Idea:  nothing is dropped.
Here:  sliding-window layers let go of what no later query can see, as the stock cache does. `without_text` is the row
       `no_context` of adamzweiger/compaction (compaction/compaction_methods/no_context.py): the run leaves the text out
       of its prompts, and bytes stand beside a full cache of the whole ones. As a cache by itself it is the full one.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods.core.contract import LayerCache, ModelSpec, Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.store import Store


@dataclass
class Full(Eviction):
    """Keep every slot; budget is always 1.

    without_text: of prompts that hold instructions and question alone.
    """

    without_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode.cap:
            raise UserError(f"method.decode.cap={self.decode.cap}: the full cache keeps everything; leave it out")
        if not self.request.is_off:
            raise UserError(f"Full: method.budget={self.budget}; the full cache keeps everything, budget=1")

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """Whether its prompts are others than those of the methods beside it."""
        return self.without_text

    def config(self) -> dict[str, Any]:
        knobs = super().config()
        return knobs if self.without_text else {name: knobs[name] for name in knobs if name != "without_text"}

    @property
    def family(self) -> str:
        return "baseline"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [FullCache(self, prompt_len) for _ in range(spec.n_layers)]

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        """Never called: at budget 1 nothing has to go."""
        raise AssertionError("the full cache dropped a slot")


class FullCache(EvictionCache):
    """One layer of all slots, whose newest may be taken back."""

    def croppable(self, columns: int) -> bool:
        return self.sees is None and columns < len(self.store)

    def crop(self, columns: int) -> Tensor:
        self.store.crop(columns)
        self.queries = []
        return (self.store.pos[:, 0] >= 0).sum(-1)
