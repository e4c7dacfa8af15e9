"""Slots that are replaced as a whole; and side arrays of any type and width, which follow their slots."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kernels import Rules
from methods.core.contract import Stage, Step
from methods.core.errors import UserError
from methods.core.meter import nbytes
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from methods.kivi import KIVI
from tests.bounds import near
from tests.kernels.formula import allowed, formula

B, H, HQ, D = 2, 2, 4, 16
SIDE = {
    "seen": ((), torch.int64),
    "flag": ((), torch.bool),
    "code": ((3,), torch.uint8),
    "two": ((2, 2), torch.bfloat16),
}


def append(store: Store, n: int, start: int = 0, padding: tuple[int, int] = (0, 0), seed: int = 0) -> Step:
    """n columns, the first `padding` of each row empty, as a step that is stored."""
    g = torch.Generator().manual_seed(start + seed)
    q, k, v = (torch.randn(B, heads, n, D, generator=g) for heads in (HQ, H, H))
    skip = torch.tensor(padding)[:, None]
    pos = torch.where(torch.arange(n) >= skip, start + torch.arange(n) - skip, -1).int()
    stage = Stage.DECODE if n == 1 else Stage.TURN
    store.append(k, v, pos, padded=any(padding))
    return Step(0, 1, stage, q, k, v, pos, torch.full((B,), start), any(padding), torch.arange(B), Rules(D**-0.5))


def named(store: Store) -> None:
    """Every side array says of each slot which position and head it is of."""
    at = store.pos.long() + 100 * torch.arange(H)[:, None]
    for name, (width, dtype) in SIDE.items():
        store.track(name, 0.0, width, dtype)
        values = at.view(*at.shape, *(1,) * len(width)).expand(*at.shape, *width)
        store.add(name, (values % 2 == 1) if dtype == torch.bool else values.to(dtype))


def check(store: Store, new: int = 0) -> None:
    """The side arrays still do; slots of positions from `new` on are as new ones begin."""
    pos = store.pos
    for name, (width, dtype) in SIDE.items():
        held = store.track(name, 0.0, width, dtype)
        assert held.dtype == dtype and held.shape == (*pos.shape, *width)
        at = pos.long() + 100 * torch.arange(H)[:, None]
        at = at.masked_fill(pos >= new, 0) if new else at
        at = at.view(*at.shape, *(1,) * len(width)).expand(*at.shape, *width)
        expected = (at % 2 == 1) if dtype == torch.bool else at.to(dtype)
        assert torch.equal(held[pos >= 0], expected[pos >= 0]), name


@pytest.mark.parametrize("padding", [(0, 0), (0, 7)])
@pytest.mark.parametrize("kind", [Store, RaggedStore])
def test_side_arrays_of_any_type_and_width_follow_drops_reorders_forks_and_freed_places(kind, padding):
    store = kind()
    append(store, 40, padding=padding)
    named(store)
    check(store)
    keep = (store.pos % 3 != 0) & (store.pos >= 0)
    if kind is RaggedStore:
        keep[:, 1] &= store.pos[:, 1] > 20  # heads hold different numbers
    store.keep(keep, int(keep.sum(-1).max()))
    check(store)
    store.reorder(torch.tensor([1, 0]))
    check(store)
    twin, alone = copy.deepcopy(store), store.select(torch.tensor([1]))
    assert torch.equal(alone.pos, store.pos[1:])
    for end in range(40, 44):  # a place is freed and taken again: the newcomer brings nothing along
        store.drop((store.pos >= 0).int().argmax(-1))
        append(store, 1, end)
        check(store, new=40)
    append(store, 2, 44)
    keep = (store.pos % 2 == 0) & (store.pos >= 0)
    store.keep(keep, int(keep.sum(-1).max()))
    check(store, new=40)
    assert not torch.equal(twin.pos, store.pos)
    check(twin)  # a fork keeps what it had
    check(alone)


def attended(store: Store, step: Step, held: tuple[Tensor, Tensor, Tensor]) -> None:
    """The step's output is the formula's over what was held before it, and its own tokens."""
    k, v, pos = (torch.cat(pair, 2) for pair in zip(held, (step.k, step.v, step.pos[:, None].expand(-1, H, -1))))
    near(
        store.attend(step),
        formula(step.q, k, v, step.rules, step.pos, pos),
        allowed(step.q, k, step.rules, step.pos, pos, v),
    )


@pytest.mark.parametrize("kind", [Store, RaggedStore])
def test_what_replaces_the_slots_is_what_later_tokens_attend_to(kind):
    """Other numbers of slots per row and head, in any order; what is not given starts anew."""
    store, g = kind(), torch.Generator().manual_seed(1)
    append(store, 30, padding=(0, 4))
    store.track("mass", 0.5).add_(1)
    store.track("votes", 0.0, (2,), torch.int16)
    store.drop(torch.zeros(B, H, dtype=torch.long))
    k, v = torch.randn(B, H, 12, D, generator=g), torch.randn(B, H, 12, D, generator=g)
    pos = torch.stack([torch.randperm(26, generator=g)[:12] for _ in range(B * H)]).view(B, H, 12)
    pos[0, 1, 5:], pos[1, 0, :2] = -1, -1
    votes = torch.randint(9, (B, H, 12, 2), generator=g)
    store.replace(k, v, pos, votes=votes)
    real = store.pos >= 0
    assert [h[h >= 0].tolist() for h in store.pos.flatten(0, 1)] == [h[h >= 0].tolist() for h in pos.flatten(0, 1)]
    assert torch.equal(store.track("votes")[real], votes[pos >= 0].short())
    assert (store.track("mass")[real] == 0.5).all()
    assert store.counted() == (pos >= 0).sum((1, 2)).tolist()
    if kind is RaggedStore:  # a head pays for what it holds
        slot = 2 * D * 4 + 4 + 4 + 2 * 2
        assert nbytes(store.tensors()) == int((pos >= 0).sum()) * (slot + 4) + B * H * 16
    attended(store, append(store, 1, 30), (k, v, pos))
    store.replace(k[:, :, :6], v[:, :, :6], pos[:, :, 6:])
    attended(store, append(store, 3, 31), (k[:, :, :6], v[:, :, :6], pos[:, :, 6:]))
    store.replace(k, v, torch.arange(12).expand(B, 1, 12), exact=True)  # one position for all heads
    assert not store.padded and nbytes(store.tensors()) == B * H * 12 * (2 * D * 4 + 4 + 4) + B * 12 * 4
    attended(store, append(store, 1, 34), (k, v, torch.arange(12).expand(B, H, 12)))


def test_a_type_stays_what_it_was_and_a_view_is_not_held():
    store, x = Store(), torch.randn(B, H, 50, D)
    store.append(x.half(), x.half(), torch.arange(50).expand(B, -1))
    store.replace(x[:, :, :8], x[:, :, 8:16], torch.arange(8).expand(B, H, 8), exact=True)
    assert store.k.dtype == torch.float16 and store.pos.dtype == torch.int32
    assert nbytes(store.tensors()) == B * H * 8 * (2 * D * 2 + 4)
    bigger = store.k.new_zeros(B, H, 90, D)
    store.replace(bigger[:, :, 40:60], bigger[:, :, :20], torch.arange(20).expand(B, H, 20), exact=True)
    assert nbytes(store.tensors()) == B * H * 20 * (2 * D * 2 + 4)


def test_numbers_beyond_float16_are_refused_by_name_and_nothing_is_replaced():
    store, x = Store(), torch.ones(1, H, 5, D)
    store.append(x.half(), x.half(), torch.arange(5)[None])
    big = x * 4
    big[0, 1, 2, 3] = 70000.0
    with pytest.raises(UserError, match="float16: v that take the place of others reach 70000"):
        store.replace(x * 2, big, store.pos, exact=True)
    assert torch.equal(store.k, x.half()) and torch.equal(store.v, x.half())
    store.replace(x * 2, big.clamp_max(65000), store.pos, exact=True)
    assert store.v.isfinite().all()


def test_an_array_that_starts_anew_with_another_width_is_counted_anew():
    store = Store()
    append(store, 10)
    plain = store.holding().held[0]
    store.track("x", 0.0, (3,), torch.uint8)
    assert store.holding().held[0] == plain + H * 10 * 3
    store.forget("x")
    store.track("x")
    assert store.holding().held[0] == plain + H * 10 * 4


def test_what_does_not_fit_is_refused():
    store = Store()
    step = append(store, 10)
    at = torch.arange(10).expand(B, H, 10)
    with pytest.raises(ValueError, match="weights: no such side array"):
        store.replace(step.k, step.v, at, weights=at)
    for k, v, pos in (
        (step.k[:1], step.v, at),
        (step.k, step.v[..., :3], at),
        (step.k, step.v, at[:, :, :4]),
        (step.k[:, :1], step.v, at),
    ):
        with pytest.raises(ValueError, match="rows, heads and widths stay"):
            store.replace(k, v, pos)
    assert torch.equal(store.k, step.k)


def test_packed_slots_are_not_replaced():
    store = KIVI(residual=8, group=8)
    step = append(store, 16)
    store.replace(step.k * 2, step.v, store.pos, exact=True)
    assert torch.equal(store.k, step.k * 2)
    store.pack(step)
    for refused in (lambda: store.replace(step.k, step.v, store.pos), lambda: store.rekey(step.k)):
        with pytest.raises(NotImplementedError, match=r"KIVI: cannot .* once they are packed"):
            refused()
