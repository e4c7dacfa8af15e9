"""Packed slots in memory that grows: keys and values, packed ones first, of rows that hold the same number of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import Layout, attend
from kernels.attend_quantized import attend_quantized
from kernels.quantize import Packed, dequantize, quantize
from methods.core.contract import Step
from methods.core.store import spare
from methods.core.stores.parts import Part
from methods.core.stores.scheme import Scheme


class GrowableBuffer:
    """A tensor that grows along dimension 2, with free places behind what is in use."""

    def __init__(self, x: Tensor):
        self.buffer, self.n = x, x.shape[2]
        self.place_bytes = x.element_size() * math.prod(x.shape[:2] + x.shape[3:])  # bytes

    @property
    def used(self) -> Tensor:
        """The places in use, a view."""
        return self.buffer[:, :, : self.n]

    @property
    def nbytes(self) -> int:
        """Bytes of places in use."""
        return self.n * self.place_bytes

    @property
    def free(self) -> int:
        """Bytes of places not in use."""
        return self.buffer.nbytes - self.nbytes

    def append(self, x: Tensor, tokens: int, to_come: int | None = None, part: int = 8) -> None:
        """x holds so many tokens; to_come: those still to be packed, where that is known; part: as in `spare`."""
        T = x.shape[2]
        n = self.n + T
        if n > self.buffer.shape[2]:
            more = None if to_come is None else 1 + T * (to_come // max(1, tokens))
            places = n + spare(self.n, more, part) // max(1, T) * T
            bigger = self.buffer.new_empty(*self.buffer.shape[:2], places, *self.buffer.shape[3:])
            bigger[:, :, : self.n] = self.used
            self.buffer = bigger
        self.buffer[:, :, self.n : n] = x
        self.n = n

    def drop(self, places: int) -> None:
        """Free the first places."""
        self.buffer, self.n = self.buffer[:, :, places : self.n].clone(), self.n - places

    def select(self, rows: Tensor) -> GrowableBuffer:
        """These rows, in memory of their own without free places."""
        return GrowableBuffer(self.used.index_select(0, rows))


class PackedTensor:
    """Keys, or values, of rows that hold the same number of slots: packed ones first, then recent ones as they came."""

    def __init__(self, recent: Tensor, scheme: Scheme):
        """recent [B, H, n, D], whose memory becomes the side's own."""
        self.scheme = scheme
        self.recent = recent  # places; in use are start … end - 1
        self.start, self.end = 0, recent.shape[2]
        self.place_bytes = recent.element_size() * math.prod(recent.shape[:2] + recent.shape[3:])  # bytes
        self.arrays: tuple[GrowableBuffer, ...] = ()  # codes, scale, offset, once something is packed

    @property
    def packed(self) -> Packed | None:
        """The tokens that are codes, as views; None while there are none."""
        if not self.arrays:
            return None
        scheme = self.scheme
        codes, scale, offset = (x.used for x in self.arrays)
        return Packed(codes, scale, offset, scheme.bits, scheme.width(self.recent.shape[-1]), scheme.dim)

    @property
    def newest(self) -> Tensor:
        """Tokens in full precision, [B, H, r, D]."""
        return self.recent[:, :, self.start : self.end]

    @property
    def n_final(self) -> int:
        """Tokens that will not be packed any more: those that are, or all at 16 bits."""
        packed = self.packed
        if self.scheme.bits == 16:
            return self.end - self.start
        return 0 if packed is None else len(packed)

    def append(self, x: Tensor, to_come: int | None = None) -> None:
        """to_come: tokens that will still come one at a time, x included; None: it is not known."""
        T, n = x.shape[2], self.end - self.start
        if self.end + T > self.recent.shape[2]:  # room for the tokens to come; what was packed is let go of
            self._move(n + (self._free_places(to_come) if T == 1 else T))
        self.recent[:, :, self.end : self.end + T] = x
        self.end += T

    def pack(self, to_come: int | None = None) -> None:
        """Pack what is due; what was packed before stays as it is."""
        n = self.scheme.due(self.end - self.start)
        if n == 0:
            return
        scheme = self.scheme
        new = quantize(self.newest[:, :, :n], scheme.bits, scheme.width(self.recent.shape[-1]), scheme.dim, scheme.zero)
        if not self.arrays:
            self.arrays = tuple(GrowableBuffer(x) for x in new.tensors())
            self.recent = self.recent[:, :, self.start + n : self.end].clone()
            self.start, self.end = 0, self.recent.shape[2]
            return
        for array, x in zip(self.arrays, new.tensors()):
            array.append(x, n, to_come, 2 * 8)
        self.start += n
        left = self.end - self.start
        if left == 0:
            self.start = self.end = 0
        if self.recent.shape[2] - left > self._free_places(to_come):  # packed tokens must not be held twice
            self._move(left)

    def read(self) -> Tensor:
        """All tokens, [B, H, n, D]."""
        packed = self.packed
        if packed is None:
            return self.newest
        return torch.cat((dequantize(packed, self.recent.dtype), self.newest), dim=2)

    def drop(self, n: int) -> None:
        """Let go of the n oldest tokens, packed ones in whole groups."""
        packed = self.packed
        if packed is None:
            self.recent = self.recent[:, :, self.start + n : self.end].clone()
            self.start, self.end = 0, self.recent.shape[2]
            return
        for array, x in zip(self.arrays, packed.narrow(0, n).tensors()):
            array.drop(x.shape[2])

    def select(self, rows: Tensor) -> PackedTensor:
        """These rows, in memory of their own."""
        side = PackedTensor(self.newest.index_select(0, rows), self.scheme)
        side.arrays = tuple(x.select(rows) for x in self.arrays)
        return side

    def tensors(self) -> Iterable[Tensor]:
        """The buffers, free places included."""
        yield self.recent
        for x in self.arrays:
            yield x.buffer

    @property
    def used(self) -> int:
        """Bytes of places in use."""
        return (self.end - self.start) * self.place_bytes + sum(x.nbytes for x in self.arrays)

    @property
    def free(self) -> int:
        """Bytes of places not in use."""
        return self.recent.nbytes - (self.end - self.start) * self.place_bytes + sum(x.free for x in self.arrays)

    def _free_places(self, to_come: int | None) -> int:
        """Free places for recent tokens: with those of the packed ones they take an eighth of what is held, or one."""
        n = self.end - self.start
        if self.scheme.bits == 16:
            return 1 + spare(n, to_come)
        places = self.used // (2 * 8) // self.place_bytes
        return max(1, min(places, self.scheme.residual, places if to_come is None else to_come))

    def _move(self, places: int) -> None:
        """The recent tokens to memory of so many places."""
        held, n = self.newest, self.end - self.start
        self.recent = held.new_empty(*held.shape[:2], places, held.shape[3])
        self.recent[:, :, :n] = held
        self.start, self.end = 0, n


class RowGroup(Part):
    """A part whose keys and values are each packed and recent tokens, attended to in one op."""

    def __init__(self, keys: PackedTensor, values: PackedTensor, pos: GrowableBuffer):
        """pos [B, H or 1, n]: positions of the slots."""
        self.keys, self.values, self.pos = keys, values, pos

    @property
    def rows(self) -> int:
        return self.keys.recent.shape[0]

    @property
    def n(self) -> int:
        return self.pos.n

    @property
    def positions(self) -> Tensor:
        return self.pos.used.expand(-1, self.keys.recent.shape[1], -1)

    @property
    def used(self) -> int:
        return self.keys.used + self.values.used + self.pos.nbytes

    @property
    def beside(self) -> int:
        return self.pos.nbytes

    def used_of(self, visible: int | None) -> int:
        """`used`, but where nothing is packed of the `visible` newest slots alone: all that later queries can see."""
        if visible is None or visible >= self.pos.n or self.keys.packed is not None or self.values.packed is not None:
            return self.used
        return self.used // self.pos.n * visible

    @property
    def free(self) -> int:
        return self.keys.free + self.values.free + self.pos.free

    def read(self) -> tuple[Tensor, Tensor]:
        return self.keys.read(), self.values.read()

    def append(self, k: Tensor, v: Tensor, pos: Tensor, to_come: int | None = None) -> None:
        self.keys.append(k, to_come)
        self.values.append(v, to_come)
        T = pos.shape[-1]
        later = None if to_come is None else to_come - T
        self.pos.append(pos.expand(-1, self.pos.buffer.shape[1], -1), T, later)

    def attend(self, step: Step) -> Tensor:
        keys, values = self.keys, self.values
        layout: Layout = "all" if step.q.shape[2] == 1 and step.rules.window is None else "positions"
        at = {"q_pos": step.pos, "k_pos": self.pos.used, "layout": layout}
        if keys.packed is None and values.packed is None:
            return attend(step.q, keys.newest, values.newest, step.rules, **at)
        return attend_quantized(step.q, (keys.packed, keys.newest), (values.packed, values.newest), step.rules, **at)

    def pack(self, to_come: int | None = None) -> None:
        self.keys.pack(to_come)
        self.values.pack(to_come)

    def keep_newest(self, n: int) -> None:
        """Packed slots go in whole groups."""
        group = self.keys.scheme.group if self.keys.scheme.dim == 2 else 1
        extra = min(self.pos.n - n, self.keys.n_final, self.values.n_final) // group * group
        if extra > 0:
            self.keys.drop(extra)
            self.values.drop(extra)
            self.pos.drop(extra)

    def nbytes(self) -> int:
        """What the schemes come to for keys and values of a prompt with so many slots."""
        sides, heads = (self.keys, self.values), self.rows * self.keys.recent.shape[1]
        return heads * sum(x.scheme.nbytes(self.pos.n, x.recent.shape[-1], x.recent.element_size()) for x in sides)

    def select(self, rows: Tensor) -> RowGroup:
        return RowGroup(self.keys.select(rows), self.values.select(rows), self.pos.select(rows))

    def tensors(self) -> Iterable[Tensor]:
        yield from self.keys.tensors()
        yield from self.values.tensors()
        yield self.pos.buffer
