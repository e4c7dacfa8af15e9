"""Bytes of the cache that attention is handed, by row: what a step really reads, whatever a method says that it does.

An op that is given keys, values or codes has them counted while somebody counts (`Turn`), and costs nothing else.
A slot is read where a query of the step sees it: padding, and what lies outside a sliding window, is no row's. It is
read once for all query heads of its KV head, and once where the same tensor is handed to several ops of one turn. What
is the same for all rows is counted on the host, from shapes; the rest where the positions are, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.attend.pages import Pages
    from kernels.attend.rules import Rules
    from kernels.quantize import Packed

P = ParamSpec("P")
R = TypeVar("R")


class Bytes:
    """So many bytes of every row of a batch."""

    def __init__(self, rows: int):
        self.rows = rows
        self.same = 0  # of every row
        self.listed: list[int] = []  # more of some, as the host knows it
        # more of some, as the device knows it: how many, [rows], int64, of things of so many bytes
        self.apart: dict[int, list[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.same or self.listed or self.apart)

    def add(self, n: int | Tensor, size: int, batch: int, rows: slice) -> None:
        """n times `size` bytes for each of these rows; n: one number, or [batch], the rows' several parts side by side.

        Raises ValueError where the batch is no multiple of the rows.
        """
        here = rows.stop - rows.start
        parts = batch // here if here else 0
        if parts * here != batch:
            raise ValueError(f"attention was handed {batch} rows where {here} are read; say which with `reads.of_rows`")
        whole = here == self.rows
        if isinstance(n, Tensor):
            new = n if parts == 1 else n.view(here, parts).sum(1)
            self.apart.setdefault(size, []).append(new if whole else _spread(new, rows, self.rows))
        elif whole:
            self.same += n * parts * size
        else:
            self.listed = self.listed or [0] * self.rows
            for row in range(rows.start, rows.stop):
                self.listed[row] += n * parts * size


class Turn:
    """What one layer's turn in a pass reads, and what it moves between host and device, inside `with` this."""

    def __init__(self, rows: int):
        self.read, self.moved = Bytes(rows), Bytes(rows)
        self.rows = slice(0, rows)  # those that ops are handed now
        self.by_token = False  # whether each token of it reads for itself
        self._met: dict[Any, Tensor] = {}  # kept, so that no other tensor takes its place in memory
        self._tokens: list[Token[Turn | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_turn.set(self))

    def __exit__(self, *error: object) -> None:
        _turn.reset(self._tokens.pop())

    def is_new(self, x: Tensor) -> bool:
        """Whether these elements have not been handed over in this turn."""
        key = x.data_ptr(), x.shape, x.stride()
        if key in self._met:
            return False
        self._met[key] = x
        return True

    def again(self) -> None:
        """The next token of a turn that is read token by token: what was read before is read once more."""
        self._met = {}


# that ops of this thread are part of; None: nobody counts
_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


class of_rows:
    """Inside `with` this ops are handed some rows of the batch alone."""

    def __init__(self, rows: slice):
        self.rows, self.turn = rows, _turn.get()

    def __enter__(self) -> None:
        if self.turn is not None:
            self.before = self.turn.rows
            self.turn.rows = slice(self.before.start + self.rows.start, self.before.start + self.rows.stop)

    def __exit__(self, *error: object) -> None:
        if self.turn is not None:
            self.turn.rows = self.before


def next_token() -> None:
    """A turn goes on with its next token, which reads for itself."""
    if (turn := _turn.get()) is not None:
        turn.by_token = True
        turn.again()


def note(*tensors: Tensor, there: Tensor | None = None) -> None:
    """These [B, ...] are read without an op: bounds, centroids, low-rank factors, slots of an attention of one's own.

    there: bool [B, H or 1, n], which of n things in x [B, H, n, ...] there are; None: all.
    """
    if (turn := _turn.get()) is not None:
        for x in tensors:
            _note(turn, turn.read, x, there)


def instead(x: Tensor, *of: Tensor) -> None:
    """x, which attention will be handed, is made of these: they are read in its place."""
    if (turn := _turn.get()) is not None and turn.is_new(x):
        note(*of)


def moved(*tensors: Tensor, there: Tensor | None = None) -> None:
    """These cross between host and device; there: as for `note`."""
    if (turn := _turn.get()) is not None:
        for x in tensors:
            _add(turn, turn.moved, x, there)


def counted(handed: Callable[..., None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An op that reads what `handed` counts of its arguments; ops that it calls read nothing more."""

    def mark(op: Callable[P, R]) -> Callable[P, R]:
        @wraps(op)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            turn = _turn.get()
            if turn is None:
                return op(*args, **kwargs)
            handed(turn, *args, **kwargs)
            token = _turn.set(None)
            try:
                return op(*args, **kwargs)
            finally:
                _turn.reset(token)

        return run

    return mark


def slots(
    turn: Turn, q: Tensor, k: Tensor, v: Tensor | None, rules: Rules, *rest: Any, q_pos: Tensor, k_pos: Tensor,
    layout: str = "positions", bias: Tensor | None = None, factor: Tensor | None = None, **named: Any,
) -> None:  # fmt: skip
    """Of an op that is given keys [B, H, S, D] and values [B, H, S, Dv], and what they weigh, [B, H or 1, S]."""
    size = sum(x.shape[-1] * x.element_size() for x in (k, v) if x is not None and turn.is_new(x))
    size += sum(x.element_size() for x in (bias, factor) if x is not None and turn.is_new(x))
    if size:
        heads = k.shape[1] if k.stride(1) else min(1, k.shape[1])
        turn.read.add(_seen(k.shape[2], heads, rules, q_pos, k_pos, layout), size, len(k), turn.rows)


def keys(turn: Turn, q: Tensor, k: Tensor, rules: Rules, *rest: Any, **named: Any) -> None:
    """Of an op that is given keys [B, H, S, D]."""
    slots(turn, q, k, None, rules, *rest, **named)


def pages(
    turn: Turn, q: Tensor, pages: Pages, tail: tuple[Tensor, Tensor, Tensor], rules: Rules, *, q_pos: Tensor,
    **weights: Any,
) -> None:  # fmt: skip
    """Of an op that is given pages and a rectangular tail."""
    k, v, pos = tail
    slots(turn, q, k, v, rules, q_pos=q_pos, k_pos=pos, **weights)
    size = sum(x.shape[-1] * x.element_size() for x in (pages.k, pages.v) if turn.is_new(x))
    size += sum(x.element_size() for x in (pages.bias, pages.factor) if x is not None and turn.is_new(x))
    if size:
        turn.read.add(_in_pages(pages, rules, q_pos), size, len(q), turn.rows)


def codes(
    turn: Turn, q: Tensor, keys: tuple[Packed | None, Tensor], values: tuple[Packed | None, Tensor], rules: Rules,
    **named: Any,
) -> None:  # fmt: skip
    """Of an op that is given packed slots, which are read whole, and recent ones behind them."""
    for packed, recent in (keys, values):
        for x in (*(() if packed is None else packed.tensors()), recent):
            _note(turn, turn.read, x, None)


def chosen(
    turn: Turn, q: Tensor, k: Tensor, v: Tensor, at: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor
) -> None:
    """Of an op that is given some slots of each head, at [B, Hq or H, n]: the union over a KV head's query heads."""
    size = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
    B, H = k.shape[:2]
    here = at.reshape(B, H, -1)
    pos = k_pos.expand(B, H, -1).gather(2, here.clamp_min(0))
    here = here.masked_fill(~_is_seen(pos, rules, q_pos), -1).sort(-1).values
    first = torch.ones_like(here, dtype=torch.bool)
    first[..., 1:] = here[..., 1:] != here[..., :-1]
    turn.read.add((first & (here >= 0)).sum((1, 2)), size, B, turn.rows)


def _seen(S: int, heads: int, rules: Rules, q_pos: Tensor, k_pos: Tensor, layout: str) -> int | Tensor:
    """Slots of all heads that any of the queries sees: of every row the same, or [B]."""
    if layout != "positions" and rules.window is None:  # then none of them is padding
        return heads * S
    if k_pos.stride(1) == 0:  # the same in all heads
        k_pos = k_pos[:, :1]
    n = _is_seen(k_pos, rules, q_pos).sum((1, 2))
    return n * heads if k_pos.shape[1] == 1 else n


def _is_seen(k_pos: Tensor, rules: Rules, q_pos: Tensor) -> Tensor:
    """Which slots any of a row's queries sees, as k_pos [B, H, S]; q_pos [B, T]."""
    one = q_pos.shape[1] == 1
    there = (k_pos >= 0) & (k_pos <= (q_pos if one else q_pos.amax(-1, keepdim=True))[..., None])
    if rules.window is None:
        return there
    first = q_pos if one else q_pos.where(q_pos >= 0, torch.iinfo(q_pos.dtype).max).amin(-1, keepdim=True)
    return there & (k_pos > first[..., None] - rules.window)


def _in_pages(pages: Pages, rules: Rules, q_pos: Tensor) -> Tensor:
    """Slots in pages that a row's query sees, [B]."""
    B = len(q_pos)
    if rules.window is None:
        return pages.held.view(B, -1).sum(1)
    row = torch.arange(len(pages.held), device=pages.at.device) // (len(pages.held) // B)
    row = row.repeat_interleave(pages.held, output_size=len(pages.at))
    pos = pages.pos[pages.at.long()]
    there = (pos >= 0) & (pos > q_pos[row, 0] - rules.window)
    return pages.held.new_zeros(B).index_add_(0, row, there.to(pages.held.dtype))


def _note(turn: Turn, to: Bytes, x: Tensor, there: Tensor | None) -> None:
    if turn.is_new(x):
        _add(turn, to, x, there)


def _add(turn: Turn, to: Bytes, x: Tensor, there: Tensor | None) -> None:
    """The elements of x [B, ...]; one that stands for many is one."""
    if there is None:
        n = 1
        for length, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
            n *= length if stride else min(length, 1)
        to.add(n, x.element_size(), len(x), turn.rows)
        return
    heads = x.shape[1] if there.shape[1] == 1 else 1
    to.add(there.sum((1, 2)) * heads, x[0, 0, 0].numel() * x.element_size(), len(x), turn.rows)


def _spread(n: Tensor, rows: slice, of: int) -> Tensor:
    whole = n.new_zeros(of)
    whole[rows] = n
    return whole
