"""Slots that lie apart: with positions, widths and attention of their own, plain or as codes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import attend_with_lse
from kernels.select import compact
from methods.core.codes.form import Coded, Form
from methods.core.contract import Step
from methods.core.stores.buffers import gathered, own
from methods.core.stores.packed import GrowableBuffer


class Segment:
    """Slots of some rows that lie apart from their others. Subclasses say how keys and values are held.

    A subclass may attend by itself, and to keys of another width; what it gives is exact for its slots.
    """

    def __init__(self, pos: Tensor):
        """pos [b, H or 1, s], int32, -1 where a head has no slot."""
        self.at = GrowableBuffer(pos.to(torch.int32, copy=True))
        self.until = 0  # tokens of the row up to its newest one; the part counts them

    @property
    def pos(self) -> Tensor:
        """Positions of the slots, [b, H or 1, s]."""
        return self.at.used

    @property
    def n(self) -> int:
        """Slots of every head."""
        return self.at.n

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys [b, H, s, D] and values [b, H, s, Dv] in full."""
        raise NotImplementedError

    def attend(self, step: Step) -> tuple[Tensor, Tensor]:
        """Output [b, Hq, T, Dv] over these slots alone, and the log-sum-exp of their logits, [b, Hq, T], float32."""
        return attend_with_lse(step.q, *self.read(), step.rules, q_pos=step.pos, k_pos=self.pos)

    def join(self, later: Segment, to_come: int | None) -> bool:
        """Take in the slots of a later segment, if that is one segment then; to_come: tokens still to be packed."""
        return False

    def check_drops(self) -> None:
        """Raises NotImplementedError, by name, where single slots cannot be dropped."""
        raise NotImplementedError(f"{type(self).__name__}: cannot drop single slots once they are packed")

    def keep(self, mask: Tensor) -> None:
        """Drop all slots but those in mask [b, H, s]; heads with fewer than others get places without a slot."""
        self.check_drops()
        slots, real = compact(mask, int(mask.sum(-1).max()))
        pos = self.pos.expand(-1, mask.shape[1], -1).gather(2, slots)
        self.at = GrowableBuffer(torch.where(real, pos, -1))
        self._keep(slots)

    def select(self, rows: Tensor) -> Segment:
        """These rows, in memory of their own."""
        raise NotImplementedError

    def tensors(self) -> Iterable[Tensor]:
        """All that is held, positions and free places included."""
        raise NotImplementedError

    @property
    def used(self) -> int:
        """Bytes in use, without positions."""
        raise NotImplementedError

    @property
    def free(self) -> int:
        """Bytes of places not in use, positions included."""
        raise NotImplementedError

    def _keep(self, slots: Tensor) -> None:
        """Only the slots [b, H, n]."""
        raise NotImplementedError


class PlainSegment(Segment):
    """Slots as they came: sinks, tokens that wait to be packed; they may weigh, as in `kernels.attend`."""

    def __init__(self, k: Tensor, v: Tensor, pos: Tensor, bias: Tensor | None = None, factor: Tensor | None = None):
        """k [b, H, s, D], v [b, H, s, Dv]; bias, factor [b, H, s], float32. Views of larger tensors are copied."""
        super().__init__(pos)
        given = {"k": k, "v": v, "bias": bias, "factor": factor}
        self.arrays = {name: GrowableBuffer(own(x)) for name, x in given.items() if x is not None}

    def read(self) -> tuple[Tensor, Tensor]:
        return self.arrays["k"].used, self.arrays["v"].used

    @property
    def weights(self) -> dict[str, Tensor]:
        """Bias and factor, where the slots have them."""
        return {name: self.arrays[name].used for name in ("bias", "factor") if name in self.arrays}

    def attend(self, step: Step) -> tuple[Tensor, Tensor]:
        return attend_with_lse(step.q, *self.read(), step.rules, q_pos=step.pos, k_pos=self.pos, **self.weights)

    def append(self, k: Tensor, v: Tensor, pos: Tensor, to_come: int | None = None) -> None:
        """New slots at the end, of arrays that do not weigh; to_come: tokens that will still come, these included."""
        T = k.shape[2]
        later = None if to_come is None else to_come - T
        for array, x in (
            (self.arrays["k"], k),
            (self.arrays["v"], v),
            (self.at, pos.expand(-1, self.pos.shape[1], -1)),
        ):
            array.append(x, T, later)

    def join(self, later: Segment, to_come: int | None) -> bool:
        if not isinstance(later, PlainSegment) or later.arrays.keys() != self.arrays.keys():
            return False
        if later.pos.shape[1] != self.pos.shape[1]:
            return False
        for array, x in ((self.at, later.at), *((a, later.arrays[name]) for name, a in self.arrays.items())):
            array.append(x.used, later.n, to_come)
        return True

    def check_drops(self) -> None:
        pass

    def drop(self, n: int) -> None:
        """Free the n oldest slots."""
        for array in (self.at, *self.arrays.values()):
            array.drop(n)

    def select(self, rows: Tensor) -> PlainSegment:
        arrays = {name: a.used.index_select(0, rows) for name, a in self.arrays.items()}
        twin = PlainSegment(**arrays, pos=self.pos.index_select(0, rows))
        twin.until = self.until
        return twin

    def tensors(self) -> Iterable[Tensor]:
        yield from (a.buffer for a in (self.at, *self.arrays.values()))

    @property
    def used(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    @property
    def free(self) -> int:
        return self.at.free + sum(a.free for a in self.arrays.values())

    def _keep(self, slots: Tensor) -> None:
        self.arrays = {name: GrowableBuffer(gathered(a.used, slots)) for name, a in self.arrays.items()}


class CodedSegment(Segment):
    """Slots whose keys and values are codes, each of a form."""

    def __init__(self, keys: Coded, values: Coded, pos: Tensor):
        super().__init__(pos)
        self.keys, self.values = keys, values

    @classmethod
    def of(cls, forms: tuple[Form, Form], k: Tensor, v: Tensor, pos: Tensor) -> CodedSegment:
        """k [b, H, s, D] and v [b, H, s, Dv] packed in these forms."""
        return cls(Coded(forms[0], k), Coded(forms[1], v), pos)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.keys.read(), self.values.read()

    def join(self, later: Segment, to_come: int | None) -> bool:
        sides = self.keys, self.values
        if type(later) is not type(self) or later.pos.shape[1] != self.pos.shape[1]:
            return False
        assert isinstance(later, CodedSegment)
        if any(a.form is not b.form or not a.form.joins for a, b in zip(sides, (later.keys, later.values))):
            return False
        self.keys.join(later.keys, to_come)
        self.values.join(later.values, to_come)
        self.at.append(later.pos, later.n, to_come)
        return True

    def check_drops(self) -> None:
        self.keys.check_drops()
        self.values.check_drops()

    def select(self, rows: Tensor) -> CodedSegment:
        twin = type(self)(self.keys.select(rows), self.values.select(rows), self.pos.index_select(0, rows))
        twin.until = self.until
        return twin

    def tensors(self) -> Iterable[Tensor]:
        yield from self.keys.tensors()
        yield from self.values.tensors()
        yield self.at.buffer

    @property
    def bits(self) -> tuple[float, int]:
        """Bits of the codes of a row, and of how many numbers they are."""
        numbers = [side.n * side.heads * side.D for side in (self.keys, self.values)]
        return sum(side.form.bits * n for side, n in zip((self.keys, self.values), numbers)), sum(numbers)

    @property
    def used(self) -> int:
        return self.keys.used + self.values.used

    @property
    def free(self) -> int:
        return self.keys.free + self.values.free + self.at.free

    def _keep(self, slots: Tensor) -> None:
        self.keys.keep(slots)
        self.values.keep(slots)
