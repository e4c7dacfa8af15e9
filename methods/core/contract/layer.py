"""What one layer stores between steps, and what several layers store together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from methods.core.contract.step import Step
from methods.core.home.old_names import adopt, unasked


@dataclass
class Holding:
    """What a layer holds, in bytes by row of its batch: what a row holds alone, whatever the others are.

    held: by the row's slots: keys, values or codes, positions, side arrays, unused places of pages.
    beside: what of it is documented on top of the budget, all but keys and values.
    padding: of places that are no slot of the row: those that make the rows of a rectangle equally long, those of slots
        that no later query sees, and free ones for tokens to come.
    alike: of it, what a row that has dropped nothing takes to lie as the rows beside it do; empty: nothing.
    host: of `held`, what lies on the host, or would where there is a device; empty: what really does beside one.
    """

    held: list[int]
    beside: list[int]
    padding: list[int]
    alike: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)

    def overhead(self) -> int:
        """Bytes beside keys and values, of all rows."""
        return sum(self.beside) + sum(self.padding)


class SharedState:
    """What several layers of one cache hold together: reordered, copied, billed and freed once.

    Each of its layers names it in `LayerCache.shares`; the lowest of them is billed for it.
    """

    def tensors(self) -> Iterable[Tensor]:
        """All held between steps, each tensor once."""
        raise NotImplementedError

    def reorder(self, rows: Tensor) -> None:
        """As `LayerCache.reorder`, once for all layers."""
        raise NotImplementedError


class LayerCache:
    """What one layer stores between steps, and how it is attended to.

    A layer may store nothing of its own and answer from what `shares` names, or from layers below.
    """

    #: the caches of all layers of the same sequences, this one among them; set by the KVCache that they belong to
    stack: Sequence[LayerCache] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt(
            cls,
            {
                "take": "append",
                "settle": "end_step",
                "asked": "budget_bytes",
                "own": "held_bytes",
            },
        )
        unasked(cls, ("read_tensors", "touched"), "what attention is handed is counted, see kernels.reads")

    def append(self, step: Step) -> None:
        """Bring in the step's keys and values and the statistics that need no output."""
        raise NotImplementedError

    def attend(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv] of the step's queries over what is held, the step itself included."""
        raise NotImplementedError

    def end_step(self, step: Step) -> None:
        """End of the layer's turn: drop, pack, merge, spill; nothing unless overridden."""

    def probe(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv] of a `Stage.PROBE` step over what is held and the step's own tokens; nothing is stored.

        `probe.attend_beside` gives it for a layer whose slots are a Store.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: this cache cannot be looked at by tokens that it does not store"
        )

    def croppable(self, columns: int) -> bool:
        """Whether the newest so many columns can be taken back: where nothing has been dropped, packed or summed up."""
        return False

    def crop(self, columns: int) -> Tensor:
        """Take the newest so many columns back, where `croppable` says so; tokens of each row that are left, [B]."""
        raise NotImplementedError

    def below(self, layer: int) -> LayerCache:
        """The cache of an earlier layer of the same sequences, whose turn in this pass is over: its slots, its scratch.

        What is read of it is billed to the reader. Raises IndexError for a layer that is not below.
        """
        here = next(i for i, one in enumerate(self.stack) if one is self)
        if not 0 <= layer < here:
            raise IndexError(f"layer {layer} is not below layer {here}")
        return self.stack[layer]

    @property
    def scratch(self) -> dict[str, Tensor]:
        """What later layers, or `Method.end_pass`, need of this one: workspace, emptied when the pass ends."""
        return self.__dict__.setdefault("_scratch", {})

    def shares(self) -> Iterable[SharedState]:
        """What it holds together with other layers; `tensors` has its tensors too."""
        return ()

    def tensors(self) -> Iterable[Tensor]:
        """Everything held between steps, each tensor once; `meter.py` counts their storages."""
        raise NotImplementedError

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

    def positions(self) -> Tensor | None:
        """Positions of the slots that are held, [B, H, S], -1 where a head holds fewer; None: it has no such list."""
        return None

    def traits(self, row: int) -> Mapping[str, Any]:
        """What else a row's heads are told apart by, such as `policy`, `bits` or `rank`: a word or number by name.

        One for all heads, or a list with one per KV head; `runner=heads` writes them down.
        """
        return {}

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from row rows[i]: beam search. rows [B], long."""
        raise NotImplementedError(f"{type(self).__name__}: rows of this cache cannot be reordered")
