"""Full-precision slots of one layer, rectangular: every row and head has the same number of places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels import Plan, attend, attend_with_mass, mass
from kernels.select import compact
from methods.core.contract import Step

# places added at once when decoding outgrows the buffer: one copy per so many tokens instead of one per token
HEADROOM = 64


class Store:
    """Keys, values, positions and side arrays of the slots that one layer holds.

    k [B, H, S, D] and v [B, H, S, Dv] are views of buffers that may have free places behind them; pos [B, H, S] int32
    is a slot's position in its row, -1 for padding. Until the first `keep` they may be the model's own tensors: replace
    them, never write into them. Side arrays [B, H, S] follow their slots through every `keep`.
    """

    def __init__(self, capacity: int | None = None):
        """capacity: places to make room for at the first append, for a prompt that comes in chunks."""
        self.capacity = capacity
        self.n = 0  # places in use
        self.padded = False  # whether any place in use is padding
        self.buffers: dict[str, Tensor] = {}  # "k", "v", "pos" and the side arrays, slots on dimension 2
        self.fills: dict[str, float] = {}  # side arrays: a new slot's value
        self.hole: Tensor | None = None  # [B, H], a freed place that the next token takes
        self.most: int | None = None  # places that will ever be needed; None: it is not known
        self.in_order = True  # whether slots lie in order of position: until a hole is filled

    def __len__(self) -> int:
        return self.n

    @property
    def k(self) -> Tensor:
        return self.buffers["k"][:, :, : self.n]

    @property
    def v(self) -> Tensor:
        return self.buffers["v"][:, :, : self.n]

    @property
    def pos(self) -> Tensor:
        return self.buffers["pos"][:, :, : self.n].expand(-1, self.k.shape[1], -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, D] and values [B, H, S, Dv] as later steps see them."""
        return self.k, self.v

    def track(
        self, name: str, fill: float = 0.0, width: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The side array `name`, [B, H, S, *width]; new slots start at `fill`. Writing to it in place is allowed.

        width: () or a number of elements per slot.
        """
        if name not in self.buffers:
            self.fills[name] = fill
            shape = (*self.k.shape[:2], self.buffers["k"].shape[2], *width)
            self.buffers[name] = torch.full(shape, fill, dtype=dtype, device=self.k.device)
        return self.buffers[name][:, :, : self.n]

    def forget(self, name: str) -> None:
        """Free the side array `name`."""
        del self.buffers[name], self.fills[name]

    def append(self, k: Tensor, v: Tensor, pos: Tensor, padded: bool = False) -> None:
        """New slots at the end: k [B, H, T, D], v [B, H, T, Dv], pos [B, T]. A hole takes the first of them."""
        self.padded |= padded
        if self.hole is not None:
            self._fill_hole(k[:, :, :1], v[:, :, :1], pos[:, :1])
            k, v, pos = k[:, :, 1:], v[:, :, 1:], pos[:, 1:]
        T = k.shape[2]
        if T == 0:
            return
        if not self.buffers and self.capacity is None:  # a whole prompt: no copy where the model's tensor is ours alone
            self.buffers = {"k": _own(k), "v": _own(v), "pos": pos[:, None].to(torch.int32).contiguous()}
            self.n = T
            return
        if not self.buffers:
            self._start(k, v, pos)
        self._room(T)
        for name, new in (("k", k), ("v", v), ("pos", pos[:, None])):
            self.buffers[name][:, :, self.n : self.n + T] = new
        for name, fill in self.fills.items():
            self.buffers[name][:, :, self.n : self.n + T] = fill
        self.n += T

    def keep(self, mask: Tensor, n: int, exact: bool = False) -> None:
        """Drop all slots but those in mask [B, H, S], at most n per head; memory is freed, the order stays.

        Heads or rows with fewer than n slots get padding at the end; exact promises that none has fewer. n and exact
        are plain values so that no device has to be waited for.
        """
        slots, real = compact(mask, n)  # [B, H, n]
        pos = self.pos.gather(2, slots)
        self.buffers = {name: _gather(self.buffers[name][:, :, : self.n], slots) for name in self.buffers}
        self.buffers["pos"] = torch.where(real, pos, -1)
        self.n = slots.shape[2]
        self.padded = not exact
        self.hole = None

    def drop(self, slot: Tensor) -> None:
        """Free one slot per row and head, slot [B, H], in place: the next token is written there."""
        assert self.hole is None, "a second hole would leave the first one unfilled"
        if self.buffers["pos"].shape[1] == 1:
            self.buffers["pos"] = self.buffers["pos"].expand(-1, self.k.shape[1], -1).clone()
        self.buffers["pos"].scatter_(2, slot[..., None], -1)
        self.hole, self.in_order = slot, False

    def keep_newest(self, n: int) -> None:
        """Drop what no row has among its n newest slots; for slots in order of arrival."""
        if self.padded and n < self.n:  # padding of a later turn stands between a row's slots
            real = self.buffers["pos"][:, 0, : self.n] >= 0  # [B, S]
            behind = real.flip(-1).cumsum(-1).flip(-1)  # the row's slots from here on
            n = self.n - int((real & (behind <= n)).any(0).int().argmax())
        if n < self.n:
            for name, buffer in self.buffers.items():
                self.buffers[name] = buffer[:, :, self.n - n : self.n].clone()
            self.n = n

    def attend(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv] of the step's queries; the step's own tokens are already stored."""
        T = step.q.shape[2]
        if self.padded or (step.rules.window is not None and T == 1):
            plan: Plan = "positions"
        elif T == 1:
            plan = "all"
        else:
            plan = "causal" if self.n == T else "positions"
        return attend(step.q, *self.read(), step.rules, q_pos=step.pos, k_pos=self.pos, plan=plan)

    def attend_with_mass(self, step: Step, n: int) -> tuple[Tensor, Tensor]:
        """What `attend` gives, and what `mass` gives, computed together."""
        return attend_with_mass(step.q, *self.read(), step.rules, n, **self._mass_layout(step, step.pos))

    def mass(self, step: Step, n: int) -> Tensor:
        """Attention that the slots get from the step's newest n queries, [B, Hq, S], slots in the order of `read`."""
        q, pos = step.q[:, :, -n:], step.pos[:, -n:]
        return mass(q, self.read()[0], step.rules, **self._mass_layout(step, pos))

    def _mass_layout(self, step: Step, q_pos: Tensor) -> dict[str, Any]:
        tail = not self.padded and (self.in_order or step.q.shape[2] == 1)
        return {"q_pos": q_pos, "k_pos": self.pos, "plan": "tail" if tail else "positions"}

    def add(self, name: str, values: Tensor) -> None:
        """Add values [B, H, S] to the side array `name`, slots in the order of `read`."""
        self.track(name).add_(values)

    def settle(self, step: Step) -> None:
        """End of a step, once the prompt is whole: pack, spill; nothing for plain slots."""

    def tensors(self) -> Iterable[Tensor]:
        """The buffers, free places included."""
        return self.buffers.values()

    def overhead(self) -> int:
        """Bytes per slot beside keys and values (positions, side arrays), and free places of the buffers."""
        if not self.buffers:
            return 0
        free = self.buffers["k"].shape[2] - self.n + (self.hole is not None)
        per_place = sum(b[:, :, :1].nbytes for name, b in self.buffers.items() if name in ("k", "v"))
        side = sum(b.nbytes for name, b in self.buffers.items() if name not in ("k", "v"))
        return min(free, HEADROOM) * per_place + side

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]."""
        self.buffers = {name: b.index_select(0, rows.to(b.device)) for name, b in self.buffers.items()}
        if self.hole is not None:
            self.hole = self.hole.index_select(0, rows.to(self.hole.device))

    def _start(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        places = max(self.capacity or 0, k.shape[2])
        self.buffers = {
            "k": k.new_empty(*k.shape[:2], places, k.shape[3]),
            "v": v.new_empty(*v.shape[:2], places, v.shape[3]),
            "pos": torch.full((pos.shape[0], 1, places), -1, dtype=torch.int32, device=pos.device),
        }

    def _room(self, T: int) -> None:
        places = self.buffers["k"].shape[2]
        if self.n + T <= places:
            return
        # a long append is exact, decoding makes room for the tokens to come
        spare = HEADROOM - 1 if T == 1 else 0
        if self.most is not None:
            spare = min(spare, max(0, self.most - len(self) - T))
        new = self.n + T + spare
        for name, buffer in self.buffers.items():
            bigger = buffer.new_empty(*buffer.shape[:2], new, *buffer.shape[3:])
            bigger[:, :, : self.n] = buffer[:, :, : self.n]
            self.buffers[name] = bigger

    def _fill_hole(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        assert self.hole is not None
        at = self.hole[..., None]  # [B, H, 1]
        self.buffers["k"].scatter_(2, at[..., None].expand(-1, -1, -1, k.shape[-1]), k)
        self.buffers["v"].scatter_(2, at[..., None].expand(-1, -1, -1, v.shape[-1]), v)
        self.buffers["pos"].scatter_(2, at, pos[:, None].expand(at.shape).to(torch.int32))
        for name, fill in self.fills.items():
            buffer = self.buffers[name]
            buffer.scatter_(2, at if buffer.dim() == 3 else at[..., None].expand(-1, -1, -1, buffer.shape[3]), fill)
        self.hole = None


def _own(x: Tensor) -> Tensor:
    """x itself when it fills its storage, else a copy: a view would keep a larger tensor alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """The slots [B, H, n] of x [B, H or 1, S, ...] in new memory."""
    if x.dim() == 3:
        return x.expand(-1, slots.shape[1], -1).gather(2, slots)
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))
