"""Methods that keep every slot, in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from methods.core.contract import Holding, LayerCache, Method, ModelSpec, Shape, Stage, Step
from methods.core.errors import UserError
from methods.core.store import spare
from methods.core.stores.parts import PartedStore
from methods.core.stores.quantized import QuantizedStore


@dataclass
class Codec(Method):
    """Keeps all slots in a quantized store.

    budget: share of the full cache's bytes in (0, 1], or the bytes of a number of its slots: the best setting is taken
    whose codes, scales and residual fit, for each row. Bits that are given are the request; budget is then 1.
    bits: of keys and values; or key_bits and value_bits apart.
    store: makes the storage of one layer from key_bits, value_bits, budget and capacity.
    """

    bits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    store: Callable[..., QuantizedStore] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        both, apart = self.bits is not None, [self.key_bits is not None, self.value_bits is not None]
        if any(apart) and (both or not all(apart)):
            raise UserError(
                f"{self.name}: method.bits={self.bits}, method.key_bits={self.key_bits}, "
                f"method.value_bits={self.value_bits}; give bits, or key_bits and value_bits, or neither and a budget"
            )
        if both:
            self.key_bits = self.value_bits = self.bits
        if self.key_bits is not None:
            self.bits, self.budget = None, 1.0
        self.new_store(0, 1)  # what cannot work is refused here and not in the middle of a run

    @property
    def family(self) -> str:
        return "quantization"

    def config(self) -> dict[str, Any]:
        store = self.store  # a functools.partial: shown as its target and arguments
        shown = {"_target_": getattr(store, "func", store).__name__, **getattr(store, "keywords", {})}
        return {**Method.config(self), "store": shown}

    def new_store(self, layer: int, n_layers: int, capacity: int | None = None) -> QuantizedStore:
        """Storage of one layer; capacity: tokens of a prompt that comes in chunks."""
        budget = self.budget if self.key_bits is None else None
        return self.store(key_bits=self.key_bits, value_bits=self.value_bits, budget=budget, capacity=capacity)

    def planned_share(self, tokens: int, spec: Shape) -> float:
        """The bytes of the bits that are given; a budget that picks them is what they are picked for."""
        if self.key_bits is None:
            return super().planned_share(tokens, spec)
        schemes = self.new_store(0, spec.n_layers).schemes[0]
        held = sum(scheme.nbytes(tokens, spec.head_dim, spec.itemsize) for scheme in schemes)
        return held / (2 * max(1, tokens) * spec.head_dim * spec.itemsize)

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        stores = [self.new_store(layer, spec.n_layers, prompt_len) for layer in range(spec.n_layers)]
        for store in stores:
            store.check(spec.head_dim)
        return [CodecCache(store) for store in stores]


class CodecCache(LayerCache):
    """One layer under a Codec, or another method that packs: append, attend, and let the store pack."""

    def __init__(self, store: PartedStore):
        self.store = store
        self.sees: int | None = None  # slots of a head that the next query of a sliding layer can see

    def append(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)

    def attend(self, step: Step) -> Tensor:
        return self.store.attend(step)

    def end_step(self, step: Step) -> None:
        window = step.rules.window
        if window is not None:  # let go of what no later query can see
            self.sees = window - 1
            self.store.keep_newest(self.sees, spare(window) if step.stage in (Stage.TURN, Stage.DECODE) else 0)
        if step.stage is not Stage.MID_PROMPT:  # packing is lossy, so a long prompt is packed once, whole
            self.store.pack(step)

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()

    def holding(self) -> Holding:
        return self.store.holding(self.sees)

    def held_bytes(self) -> list[int]:
        return self.store.held_bytes(self.sees)

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        return self.store.budget_bytes(full)

    def expect(self, new: int) -> None:
        self.store.expect(new)

    def nominal_bits(self) -> Sequence[float] | None:
        return self.store.nominal_bits()

    def positions(self) -> Tensor:
        return self.store.pos

    def traits(self, row: int) -> Mapping[str, Any]:
        return self.store.traits(row)

    def reorder(self, rows: Tensor) -> None:
        self.store.reorder(rows)
