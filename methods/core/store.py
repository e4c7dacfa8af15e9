"""Full-precision slots of one layer, rectangular: every row and head has the same number of places."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kernels import Attended, Layout, Sums, attend, attend_with_mass, attend_with_sums, mass
from kernels.select import compact, put
from methods.core.contract import Step
from methods.core.decision import taken
from methods.core.home.old_names import adopt
from methods.core.stores.buffers import fitting, gathered, own
from methods.core.stores.counted import Counted


def spare(n: int, to_come: int | None = None, part: int = 8) -> int:
    """Free places to make beside the one that a token needs where n are in use: an eighth, at least one.

    One copy serves so many tokens, and free places stay few beside what is held. to_come: tokens that will still come,
    this one included; None: it is not known.  part: another share than an eighth.
    """
    places = max(1, n // part)
    return places if to_come is None else min(places, to_come - 1)


#: side arrays that weigh a slot in every attention: what is added to its logits, and what multiplies its value; their
#: names in `kernels.attend`, and what a new slot has
WEIGHTS = {"logit_bias": ("bias", 0.0), "value_factor": ("factor", 1.0)}


class Store(Counted):
    """Keys, values, positions and side arrays of the slots that one layer holds.

    k [B, H, S, D] and v [B, H, S, Dv] are views of buffers that may have free places behind them; pos [B, H, S] int32
    is a slot's position in its row, -1 for padding. Until the first `keep` they may be the model's own tensors: replace
    them, never write into them. Side arrays [B, H, S] follow their slots through every `keep`.
    """

    #: all heads of a row must hold the same number of slots
    heads_alike: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt(cls, {"settle": "pack", "own": "held_bytes"})

    def __init__(self, capacity: int | None = None):
        """capacity: places to make room for at the first append, for a prompt that comes in chunks."""
        super().__init__()
        self.capacity = capacity
        self.fills: dict[str, float] = {}  # side arrays: a new slot's value
        self.max_slots: int | None = None  # places that will ever be needed; None: it is not known
        self.to_come: int | None = None  # tokens that will still come one at a time; None: it is not known
        self.in_order = True  # whether slots lie in order of position: until a freed one is filled again

    def __len__(self) -> int:
        return self.n

    @property
    def v(self) -> Tensor:
        """Values of the slots in use, [B, H, S, Dv], as they are held."""
        return self.buffers["v"][:, :, : self.n]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, D] and values [B, H, S, Dv] as later steps see them."""
        return self.k, self.v

    def track(
        self, name: str, fill: float = 0.0, width: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The side array `name`, [B, H, S, *width]; new slots start at `fill`. Writing to it in place is allowed.

        width: of what a slot has, () being one number. What is tracked as "logit_bias" is added to the slots' logits
        and "value_factor" multiplies their values, in all attention; both are one float32, and new slots weigh nothing.
        """
        if name in WEIGHTS:
            fill, width, dtype = WEIGHTS[name][1], (), torch.float32
        if name not in self.buffers:
            self.fills[name], self._sizes = fill, ((), (0, 0, 0))
            shape = (*self.k.shape[:2], self.buffers["k"].shape[2], *width)
            self.buffers[name] = torch.full(shape, fill, dtype=dtype, device=self.k.device)
        return self.buffers[name][:, :, : self.n]

    def weights(self) -> dict[str, Tensor]:
        """What the slots weigh, for `kernels.attend`: bias and factor [B, H, S], where they are tracked."""
        return {op: self.track(name) for name, (op, _) in WEIGHTS.items() if name in self.fills} if self.fills else {}

    def forget(self, name: str) -> None:
        """Free the side array `name`."""
        del self.buffers[name], self.fills[name]

    def append(self, k: Tensor, v: Tensor, pos: Tensor, padded: bool = False) -> None:
        """New slots at the end: k [B, H, T, D], v [B, H, T, Dv], pos [B, T]. A free slot takes the first of them."""
        self.padded |= padded
        self._count_in(k, padded)
        to_come = self.to_come
        if to_come is not None and pos.shape[1] == 1:
            self.to_come = to_come - 1 if to_come > 1 else None
        if self.free_slot is not None:
            self._fill_free_slot(k[:, :, :1], v[:, :, :1], pos[:, :1])
            k, v, pos = k[:, :, 1:], v[:, :, 1:], pos[:, 1:]
        T = k.shape[2]
        if T == 0:
            return
        if not self.buffers and self.capacity is None:  # a whole prompt: no copy where the model's tensor is ours alone
            # positions are the layer's own: what it holds is the same whether a prompt comes whole or in chunks
            self.buffers = {"k": own(k), "v": own(v), "pos": pos[:, None].to(torch.int32, copy=True)}
            self.n = T
            return
        if not self.buffers:
            self._start(k, v, pos)
        self._make_places(T, to_come)
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
        self.buffers = {name: gathered(self.buffers[name][:, :, : self.n], slots) for name in self.buffers}
        self.buffers["pos"] = torch.where(real, pos, -1)
        self.n = slots.shape[2]
        self.padded = not exact
        self.free_slot = None
        self.real = [mask.shape[1] * self.n] * mask.shape[0] if exact else None

    def replace(self, k: Tensor, v: Tensor, pos: Tensor, exact: bool = False, **side: Tensor) -> None:
        """These are now the slots: k [B, H, S, D], v [B, H, S, Dv], pos [B, H or 1, S], -1 for padding.

        side: side arrays [B, H, S, ...] that are tracked; those that are not given start anew. Types stay what they
        were. exact promises that no slot is padding, a plain value as in `keep`.  Raises ValueError for other shapes
        than these, and for a side array that is not tracked; UserError for a number that float16 does not hold.
        """
        if unknown := set(side) - set(self.fills):
            raise ValueError(f"{type(self).__name__}.replace: {', '.join(sorted(unknown))}: no such side array")
        H, S = k.shape[1:3]
        given = {"k": k, "v": v, "pos": pos, **side}
        for name, x in given.items():
            old, heads = self.buffers[name], (1, H) if name == "pos" else (H,)
            if x.shape[0] != len(old) or x.shape[1] not in heads or x.shape[2] != S or x.shape[3:] != old.shape[3:]:
                raise ValueError(
                    f"{type(self).__name__}.replace: {name} {list(x.shape)} beside keys {list(k.shape)}; it held "
                    f"{list(old.shape)}, and rows, heads and widths stay"
                )
        slots = {name: own(fitting(name, x, self.buffers[name].dtype)) for name, x in given.items()}
        for name, fill in self.fills.items():
            if name not in side:
                old = self.buffers[name]
                slots[name] = old.new_full((*k.shape[:3], *old.shape[3:]), fill)
        self.buffers = slots
        self.n, self.free_slot, self.in_order = S, None, False
        self.padded = not exact and bool((pos < 0).any())
        self.real = None

    def rekey(self, k: Tensor) -> None:
        """Other keys [B, H, s, D] for the first s slots of a store that has been cut, in place."""
        self.buffers["k"][:, :, : k.shape[2]] = k

    def crop(self, columns: int) -> None:
        """Take the newest columns back, of a store that has dropped nothing; their memory is freed."""
        self.n -= columns
        self.buffers = {name: buffer[:, :, : self.n].clone() for name, buffer in self.buffers.items()}
        self.padded, self.real = bool((self.buffers["pos"] < 0).any()), None

    def drop(self, slot: Tensor, rows: Sequence[bool] | None = None) -> None:
        """Free one place per row and head, slot [B, H], in place: the next token is written there.

        rows: those that lose a slot; the place of the others is free already. None: all do.
        """
        assert self.free_slot is None, "a second free slot would leave the first one unfilled"
        self._count_out(slot, rows)
        if self.buffers["pos"].shape[1] == 1:
            self.buffers["pos"] = self.buffers["pos"].expand(-1, self.k.shape[1], -1).clone()
        self.buffers["pos"].scatter_(2, slot[..., None], -1)
        self.free_slot, self.in_order = slot, False

    def keep_newest(self, n: int, slack: int = 0) -> None:
        """Drop all but each row's n newest slots, if there are more than n + slack; for slots in order of arrival."""
        if self.n <= n + slack:
            return
        places = n
        if self.padded:  # padding of a later turn stands between a row's slots
            pos = self.buffers["pos"][:, :, : self.n]  # [B, H or 1, S]
            newer = (pos >= 0).flip(-1).cumsum(-1).flip(-1)  # the row's slots from here on
            stays = (pos >= 0) & (newer <= n)
            pos.masked_fill_(~stays, -1)
            places = self.n - int(stays.flatten(0, 1).any(0).int().argmax())
            self.padded = not bool(stays[:, :, -places:].all())
        for name, buffer in self.buffers.items():
            self.buffers[name] = buffer[:, :, self.n - places : self.n].clone()
        self.n, self.real = places, None

    def attend(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv] of the step's queries; the step's own tokens are already stored."""
        T = step.q.shape[2]
        if self.padded or (step.rules.window is not None and T == 1):
            layout: Layout = "positions"
        elif T == 1:
            layout = "all"
        else:
            layout = "causal" if self.n == T else "positions"
        at: dict[str, Any] = {"q_pos": step.pos, "k_pos": self.pos, "layout": layout, **self.weights()}
        return attend(step.q, *self.read(), step.rules, **at)

    def attend_with_mass(self, step: Step, n: int) -> tuple[Tensor, Tensor]:
        """What `attend` gives, and what `mass` gives, computed together."""
        return attend_with_mass(step.q, *self.read(), step.rules, n, **self._mass_layout(step, step.pos))

    def mass(self, step: Step, n: int) -> Tensor:
        """Attention that the slots get from the step's newest n queries, [B, Hq, S], slots in the order of `read`."""
        q, pos = step.q[:, :, -n:], step.pos[:, -n:]
        at = self._mass_layout(step, pos)
        at.pop("factor", None)  # the attention that a slot gets is not its value's
        return mass(q, self.read()[0], step.rules, **at)

    def attend_with_sums(self, step: Step, sums: Sequence[Sums], output: bool = True) -> Attended:
        """What `attend` gives, None without `output`, and sums over its rows, each [B, Hq, S], slots as in `read`."""
        (k, v), at = self.read(), self._mass_layout(step, step.pos)
        return attend_with_sums(step.q, k, v if output else None, step.rules, sums, **at)

    def layout(self, T: int) -> str:
        """What `kernels.mass` may be told of a step of T tokens: "tail" where no slot is padding and they come last."""
        return "tail" if not self.padded and (self.in_order or T == 1) else "positions"

    def _mass_layout(self, step: Step, q_pos: Tensor) -> dict[str, Any]:
        return {"q_pos": q_pos, "k_pos": self.pos, "layout": self.layout(step.q.shape[2]), **self.weights()}

    def add(self, name: str, values: Tensor) -> None:
        """Add values [B, H, S] to the side array `name`, slots in the order of `read`."""
        self.track(name).add_(values)

    def pack(self, step: Step) -> None:
        """End of a step, once the prompt is whole: pack, spill; nothing for plain slots."""

    def tensors(self) -> Iterable[Tensor]:
        """The buffers, free places included."""
        return self.buffers.values()

    def tighten(self) -> None:
        """Free the places that are not in use."""
        if self.buffers and self.buffers["k"].shape[2] > self.n:
            self.buffers = {name: buffer[:, :, : self.n].clone() for name, buffer in self.buffers.items()}

    def expect(self, new: int) -> None:
        """So many tokens will be appended one at a time: no places are made for more."""
        self.to_come = new or None

    def cap(self, places: int) -> None:
        """So many places are all that will ever be needed: none are made beyond them while decoding."""
        self.max_slots = places

    def detach(self) -> None:
        """Let no later gradient reach what is held."""
        self.buffers = {name: buffer.detach() for name, buffer in self.buffers.items()}

    def select(self, rows: Tensor) -> Self:
        """These rows in a store of their own, which shares nothing with this one."""
        twin = copy.copy(self)
        twin.__dict__ = {name: copy.copy(x) if isinstance(x, (dict, list)) else x for name, x in vars(self).items()}
        twin.reorder(rows)
        return twin

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]."""
        if self.real is not None:
            self.real = taken(self.real, rows)
        if self.whole is not None:
            self.whole = taken(self.whole, rows)
        self.buffers = {name: b.index_select(0, rows.to(b.device)) for name, b in self.buffers.items()}
        if self.free_slot is not None:
            self.free_slot = self.free_slot.index_select(0, rows.to(self.free_slot.device))

    def _start(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        places = max(self.capacity or 0, k.shape[2])
        self.buffers = {
            "k": k.new_empty(*k.shape[:2], places, k.shape[3]),
            "v": v.new_empty(*v.shape[:2], places, v.shape[3]),
            "pos": torch.full((pos.shape[0], 1, places), -1, dtype=torch.int32, device=pos.device),
        }

    def _make_places(self, T: int, to_come: int | None) -> None:
        places = self.buffers["k"].shape[2]
        if self.n + T <= places:
            return
        # a long append is exact, decoding makes room for the tokens to come
        extra = spare(self.n, to_come) if T == 1 else 0
        if self.max_slots is not None:
            extra = min(extra, max(0, self.max_slots - len(self) - T))
        new = self.n + T + extra
        for name, buffer in self.buffers.items():
            bigger = buffer.new_empty(*buffer.shape[:2], new, *buffer.shape[3:])
            bigger[:, :, : self.n] = buffer[:, :, : self.n]
            self.buffers[name] = bigger

    def _fill_free_slot(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        assert self.free_slot is not None
        slot = self.free_slot
        B, H = slot.shape
        for name, new in (("k", k[:, :, 0]), ("v", v[:, :, 0]), ("pos", pos.expand(B, H))):
            put(self.buffers[name], slot, new)
        for name, fill in self.fills.items():
            buffer = self.buffers[name]
            put(buffer, slot, buffer.new_full((B, H, *buffer.shape[3:]), fill))
        self.free_slot = None
