"""Full-precision slots where every row and head keeps its own number: flat pages, so that dropped slots are freed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels import Attended, Sums
from kernels.attend import Pages, attend, attend_pages, attend_pages_with_mass
from kernels.mass.sums import of_one_query
from methods.core.contract import Holding, Step
from methods.core.store import WEIGHTS, Store


class RaggedStore(Store):
    """A Store whose heads keep different numbers of slots.

    Until the first `keep` it is a plain Store. Then the kept slots lie in flat pages of one slot each, [N, D], and a
    table says where those of each row and head (b * H + h) lie: a head holds what it keeps and no place more. New
    tokens go to the rectangular tail that the base class holds. A later `keep` moves the tail's slots into the places
    that are freed, whichever head they were of; places that stay free are an eighth of what is held at most, else the
    pages are made anew. What a decode step asks of the pages' layout lies on the device, so that it waits for nothing
    and does the same ops whatever the numbers are.
    """

    def __init__(self, capacity: int | None = None):
        super().__init__(capacity)
        self.pages: dict[str, Tensor] = {}  # "k", "v", "pos" and the side arrays, [N, ...]
        self.at = torch.empty(0)  # places of the first head's slots, then of the second's and so on, int32
        self.counts: list[int] = []  # slots in pages per row and head
        self.held = torch.empty(0)  # the same on the device, [B * H]
        self.first = torch.empty(0)  # where each head's slots begin in `at`, [B * H]

    def __len__(self) -> int:
        return self.n + max(self.counts, default=0)

    @property
    def pos(self) -> Tensor:
        return self._whole("pos", -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as padded rectangles [B, H, S, D]: a copy once there are pages; `pos` tells padding."""
        return self._whole("k", 0), self._whole("v", 0)

    def track(
        self, name: str, fill: float = 0.0, width: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The side array in the order of `read`, [B, H, S, *width]; a copy once there are pages: write with `add`."""
        super().track(name, fill, width, dtype)
        fill, width = self.fills[name], self.buffers[name].shape[3:]
        if self.counts and name not in self.pages:
            self.pages[name] = self.k.new_full((len(self.pages["pos"]), *width), fill, dtype=self.buffers[name].dtype)
        return self._whole(name, fill)

    def forget(self, name: str) -> None:
        super().forget(name)
        self.pages.pop(name, None)

    def add(self, name: str, values: Tensor) -> None:
        if not self.counts:
            super().add(name, values)
            return
        n = max(self.counts)
        self.track(name)
        at, real = self._places(n)
        old = values[:, :, :n].flatten(0, 1).masked_fill(~_like(real, values.dim() - 1), 0)  # [B * H, n, ...]
        self.pages[name].index_add_(0, at.flatten(), old.flatten(0, 1))
        self.buffers[name][:, :, : self.n] += values[:, :, n:]

    def keep(self, mask: Tensor, n: int, exact: bool = False) -> None:
        """Drop all slots but those in mask [B, H, S], any number per head; their places are freed, or taken by others.

        Rows that lose no slot stay as they are: where a slot lies must not depend on other rows.
        """
        B, H, S = mask.shape
        tail: dict[str, Tensor] = {}
        if not self.counts:
            where = mask.nonzero(as_tuple=True)
            whole = {name: self._whole(name, self._fill(name)) for name in self.buffers}
            self.pages = {name: x[where] for name, x in whole.items()}
            self.at = torch.arange(len(where[0]), dtype=torch.int32, device=mask.device)
        else:
            lost = (self.pos >= 0).sum((1, 2)) > mask.sum((1, 2))  # [B]
            tail = self._tail_of(lost)
            if tail:
                mask = mask & (lost[:, None, None] | (torch.arange(S, device=mask.device) < S - self.n))
            self._refill(mask)
        heads = 1 if not tail else self.buffers["pos"].shape[1]
        empty = {
            name: x.new_empty(B, heads if name == "pos" else H, 0, *x.shape[3:]) for name, x in self.buffers.items()
        }
        self.buffers = tail or empty
        self.n, self.padded, self.free_slot = self.buffers["k"].shape[2], bool(tail), None
        self.held = mask.sum(-1).flatten()
        self.first = self.held.cumsum(0) - self.held
        self.counts = self.held.tolist()
        self.real = self._in_pages(self.counts) if not tail else None

    def replace(self, k: Tensor, v: Tensor, pos: Tensor, exact: bool = False, **side: Tensor) -> None:
        super().replace(k, v, pos, exact, **side)
        self.pages, self.counts = {}, []
        if self.padded:  # heads that hold fewer pay for no more
            self.keep(self.pos >= 0, self.n)

    def rekey(self, k: Tensor) -> None:
        if self.counts:
            raise NotImplementedError(
                f"{type(self).__name__}: keys of heads that hold different numbers stay as they are"
            )
        super().rekey(k)

    def detach(self) -> None:
        super().detach()
        self.pages = {name: x.detach() for name, x in self.pages.items()}

    def _refill(self, mask: Tensor) -> None:
        """Frees what is not in mask [B, H, S] and moves the tail's slots that are into pages."""
        n, size = max(self.counts), len(self.pages["pos"])
        places = mask.new_zeros(mask.shape, dtype=torch.long)
        places[..., :n] = self._places(n)[0].view(*mask.shape[:2], n)
        row, head, slot = mask[..., n:].nonzero(as_tuple=True)
        stay = places[..., :n][mask[..., :n]]
        total = len(stay) + len(row)
        if total > size:
            to_come = total if self.to_come is None else self.to_come * len(self.held)
            more = total + min(total // 8, to_come) - size
            self.pages = {name: torch.cat((x, x.new_empty(more, *x.shape[1:]))) for name, x in self.pages.items()}
            size += more
        free = torch.ones(size, dtype=torch.bool, device=mask.device).index_fill(0, stay, False).nonzero()[:, 0]
        to = free[: len(row)]
        for name, x in self.pages.items():
            x[to] = self.buffers[name][row, head if self.buffers[name].shape[1] > 1 else 0, slot].to(x.dtype)
        places[row, head, n + slot] = to
        at = places[mask]
        if size - total > total // 8:
            self.pages, at = {name: x[at] for name, x in self.pages.items()}, torch.arange(total, device=at.device)
        self.at = at.to(torch.int32)

    def _tail_of(self, lost: Tensor) -> dict[str, Tensor]:
        """The tail without the rows lost [B]; nothing where no other has one."""
        pos = self.buffers["pos"][:, :, : self.n].masked_fill(lost[:, None, None], -1)
        real = (pos >= 0).flatten(0, 1).any(0)  # [T]
        if not bool(real.any()):
            return {}
        first = int(real.int().argmax())
        tail = {name: x[:, :, first : self.n].clone() for name, x in self.buffers.items() if name != "pos"}
        return {**tail, "pos": pos[:, :, first:].clone()}

    def drop(self, slot: Tensor, rows: Sequence[bool] | None = None) -> None:
        if not self.counts:
            super().drop(slot, rows)
            return
        assert self.free_slot is None, "a second free slot would leave the first one unfilled"
        self._count_out(slot, rows)
        if self.buffers["pos"].shape[1] == 1:
            self.buffers["pos"] = self.buffers["pos"].expand(-1, self.k.shape[1], -1).clone()
        self._write(slot, {"pos": torch.full_like(slot, -1)})
        self.free_slot, self.in_order = slot, False

    def attend(self, step: Step) -> Tensor:
        """Output [B, Hq, T, Dv]; one token reads pages and tail where they lie, more tokens read a rectangle."""
        if not self.counts:
            return super().attend(step)
        if step.q.shape[2] > 1:
            return attend(step.q, *self.read(), step.rules, q_pos=step.pos, k_pos=self.pos, **self.weights())
        tail = self.k, self.v, super().pos
        return attend_pages(step.q, self._table(), tail, step.rules, q_pos=step.pos, **self._weights_of_tail())

    def attend_with_mass(self, step: Step, n: int) -> tuple[Tensor, Tensor]:
        """As the base's; of one token slots are read once, where they lie."""
        if not self.counts or step.q.shape[2] > 1:
            return super().attend_with_mass(step, n)
        tail = self.k, self.v, super().pos
        at = self._weights_of_tail()
        return attend_pages_with_mass(step.q, self._table(), tail, step.rules, q_pos=step.pos, **at)

    def attend_with_sums(self, step: Step, sums: Sequence[Sums], output: bool = True) -> Attended:
        """As the base's; of one token slots are read once, where they lie."""
        if not (self.counts and output and step.q.shape[2] == 1 and all(one.plain for one in sums)):
            return super().attend_with_sums(step, sums, output)
        out, probs = self.attend_with_mass(step, 1)
        return out, [of_one_query(probs, one, step.pos, self.pos) for one in sums]

    def layout(self, T: int) -> str:
        """As the base's; "positions" once there are pages, as shorter heads have padding before the newest slots."""
        return "positions" if self.counts else super().layout(T)

    def tensors(self) -> Iterable[Tensor]:
        yield from super().tensors()
        yield from self.pages.values()
        if self.counts:
            yield from (self.at, self.held, self.first)

    def holding(self, visible: int | None = None) -> Holding:
        """As the base's; a slot in pages has its place in the table, and a head its two numbers.

        Free places of the pages are no row's own: they are shared out as padding.
        """
        if not self.counts:
            return super().holding(visible)
        H, (kv, side, pos) = self.k.shape[1], self._per_slot()
        in_pages, slots = self._in_pages(self.counts), self.counted()
        tail = [n - m for n, m in zip(slots, in_pages)]  # less than nothing: the free slot is in a page
        once = self.buffers["pos"].shape[1] == 1
        layout = [m * self.at.element_size() + 2 * H * self.held.element_size() for m in in_pages]
        beside = [
            t * side + (t // H if once else t) * pos + m * (side + pos) + more
            for t, m, more in zip(tail, in_pages, layout)
        ]
        held = [n * kv + more for n, more in zip(slots, beside)]
        places = sum(x.nbytes for x in self.buffers.values()) // len(self.k)
        free, rows = (len(self.pages["pos"]) - sum(in_pages)) * (kv + side + pos), len(in_pages)
        shared = [free // rows + (i < free % rows) for i in range(rows)]
        total = [places + m * (kv + side + pos) + more + f for m, more, f in zip(in_pages, layout, shared)]
        padding = [a - b for a, b in zip(total, held)]
        if self.whole is None:
            return Holding(held, beside, padding, [0] * len(held))
        # a row that has dropped nothing needs no pages
        slots = self._visible(visible)
        plain = self._beside(slots)
        alike = [m - n * kv - x if whole else 0 for m, n, x, whole in zip(held, slots, plain, self.whole)]
        beside = [x if whole else n for n, x, whole in zip(beside, plain, self.whole)]
        held, padding = [n - m for n, m in zip(held, alike)], [n + m for n, m in zip(padding, alike)]
        return Holding(held, beside, padding, alike)

    def held_bytes(self, visible: int | None = None) -> list[int]:
        return self.holding(visible).held if self.counts else super().held_bytes(visible)

    def _in_pages(self, counts: Sequence[int]) -> list[int]:
        """Numbers per row and head, added up per row."""
        H = self.k.shape[1]
        return [sum(counts[i : i + H]) for i in range(0, len(counts), H)]

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if not self.counts:
            return
        H, device = self.buffers["k"].shape[1], self.at.device
        old = (rows.to(device)[:, None] * H + torch.arange(H, device=device)).flatten()  # [B * H]
        self.counts = [self.counts[i] for i in old.tolist()]
        self.held, came_from = self.held[old], self.first[old]
        self.first, total = self.held.cumsum(0) - self.held, sum(self.counts)
        owners = torch.repeat_interleave(torch.arange(len(old), device=device), self.held, output_size=total)
        order = torch.arange(total, device=device) + (came_from - self.first)[owners]
        places = self.at[order].long()
        self.pages = {name: x[places] for name, x in self.pages.items()}
        self.at = torch.arange(total, dtype=torch.int32, device=device)

    def _fill_free_slot(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        if not self.counts:
            super()._fill_free_slot(k, v, pos)
            return
        assert self.free_slot is not None
        new = {
            name: (b := self.buffers[name]).new_full((*self.free_slot.shape, *b.shape[3:]), fill)
            for name, fill in self.fills.items()
        }
        self._write(self.free_slot, {"k": k[:, :, 0], "v": v[:, :, 0], "pos": pos.expand(self.free_slot.shape), **new})
        self.free_slot = None

    def _write(self, slot: Tensor, new: dict[str, Tensor]) -> None:
        """New values [B, H, ...] of some arrays in one slot per row and head, slot [B, H] in the order of `read`.

        Whether a head's slot lies in its pages or in the tail is known on the device alone. So that the host need not
        wait, both are written for every head, and a head that has no slot in one of them changes nothing there.
        """
        n = max(self.counts)  # `read` gives n slots of pages per head, then the tail
        if n > 0:
            inside = (slot < n).flatten()  # [B * H]
            # pages have no place to spare: a head whose slot is in the tail writes once more what the first head with
            # a slot in pages writes, in the same place; with no such head all write the first place as it is
            head = torch.where(inside, torch.arange(len(inside), device=slot.device), inside.int().argmax())
            entry = torch.where(inside.any(), (self.first + slot.flatten())[head], 0)
            at = self.at[entry].long()
            for name, x in new.items():
                flat = self.pages[name]
                flat[at] = torch.where(inside.any(), x.flatten(0, 1)[head].to(flat.dtype), flat[at])
        if self.n > 0:
            # in the tail every head has places of its own: one whose slot is in pages writes its first as it is
            rows, heads = (torch.arange(m, device=slot.device) for m in slot.shape)
            index = rows[:, None], heads, (slot - n).clamp_min(0)
            for name, x in new.items():
                buffer, outside = self.buffers[name], (slot >= n).view(*slot.shape, *(1,) * (x.dim() - 2))
                buffer[index] = torch.where(outside, x.to(buffer.dtype), buffer[index])

    def _fill(self, name: str) -> float:
        return -1 if name == "pos" else self.fills.get(name, 0.0)

    def _table(self) -> Pages:
        p = self.pages
        weights = {op: p[name] for name, (op, _) in WEIGHTS.items() if name in p}
        return Pages(p["k"], p["v"], p["pos"], self.at, self.first, self.held, max(self.counts), **weights)

    def _weights_of_tail(self) -> dict[str, Tensor]:
        return {op: self.buffers[name][:, :, : self.n] for name, (op, _) in WEIGHTS.items() if name in self.fills}

    def _places(self, n: int) -> tuple[Tensor, Tensor]:
        """The place of every head's i-th slot, and whether there is one, else some place; both [B * H, n]."""
        return self._table().places(0, n)

    def _whole(self, name: str, fill: float) -> Tensor:
        """Pages and tail of one array as a padded rectangle [B, H, S, ...]."""
        tail = self.buffers[name][:, :, : self.n]
        B, H = self.buffers["k"].shape[:2]
        tail = tail.expand(B, H, *tail.shape[2:])
        if not self.counts:
            return tail
        at, real = self._places(max(self.counts))
        part = self.pages[name][at]  # [B * H, n, ...]
        part = part.masked_fill(~_like(real, part.dim()), fill)
        return torch.cat((part.view(B, H, *part.shape[1:]), tail.to(part.dtype)), dim=2)


def _like(x: Tensor, dim: int) -> Tensor:
    """x with so many dimensions, the new ones behind its own."""
    return x.view(*x.shape, *(1,) * (dim - x.dim()))
