"""Stores against plain lists, one per row and head: whatever is done to them, both hold the same slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Rules
from methods.core.contract import Stage, Step
from methods.core.meter import nbytes
from methods.core.store import Store, spare
from methods.core.stores.ragged import RaggedStore
from tests.bounds import bound, near
from tests.kernels.formula import allowed, formula

B, H, HQ, D = 3, 2, 4, 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": Rules(D**-0.5),
    "window": Rules(D**-0.5, window=9),
    "softcap": Rules(D**-0.5, softcap=1.5),
    "slopes": Rules(D**-0.5, slopes=SLOPES),
}


class Lists:
    """A store beside its model: per row and head a dict from position to what the slot holds."""

    def __init__(self, kind: type[Store], seed: int = 0, capacity: int | None = None):
        self.store = kind(capacity)
        self.g = torch.Generator().manual_seed(seed)
        self.slots: list[list[dict[int, dict[str, Any]]]] = [[{} for _ in range(H)] for _ in range(B)]
        self.seen = torch.zeros(B, dtype=torch.int32)
        self.side: dict[str, float] = {}

    def append(self, T: int, padding: tuple[int, ...] = (0,) * B) -> tuple[Tensor, Tensor, Tensor]:
        """T columns, the first `padding` of each row empty; returns k, v, pos."""
        k, v = torch.randn(B, H, T, D, generator=self.g), torch.randn(B, H, T, D, generator=self.g)
        column, skip = torch.arange(T), torch.tensor(padding)[:, None]
        pos = torch.where(column >= skip, self.seen[:, None] + column - skip, -1).int()
        self.store.append(k, v, pos, padded=any(padding))
        self.seen = self.seen + T - skip[:, 0].int()
        for b in range(B):
            for h in range(H):
                for t in range(padding[b], T):
                    new = {"k": k[b, h, t], "v": v[b, h, t], **self.side}
                    self.slots[b][h][int(pos[b, t])] = new
        return k, v, pos

    def track(self, name: str, fill: float) -> None:
        self.side[name] = fill
        self.store.track(name, fill)
        for held in self.heads():
            for slot in held.values():
                slot[name] = fill

    def add(self, name: str) -> None:
        values = torch.randn(self.store.pos.shape, generator=self.g)
        self.store.add(name, values)
        numbers = values.tolist()
        for b, h, s, p in self.places():
            self.slots[b][h][p][name] += numbers[b][h][s]

    def keep(self, counts: list[list[int]]) -> None:
        """A random choice of so many slots per row and head."""
        mask = torch.zeros(self.store.pos.shape, dtype=torch.bool)
        for b in range(B):
            for h in range(H):
                held = sorted(self.slots[b][h])
                chosen = {held[i] for i in torch.randperm(len(held), generator=self.g)[: counts[b][h]].tolist()}
                self.slots[b][h] = {p: self.slots[b][h][p] for p in chosen}
        for b, h, s, p in self.places():
            mask[b, h, s] = p in self.slots[b][h]
        flat = [n for row in counts for n in row]
        self.store.keep(mask, max(flat), exact=min(flat) == max(flat))

    def drop(self) -> None:
        """Another random slot per head goes."""
        at = torch.zeros(B, H, dtype=torch.long)
        for b in range(B):
            for h in range(H):
                held = sorted(self.slots[b][h])
                p = held[int(torch.randint(len(held), (1,), generator=self.g))]
                at[b, h] = (self.store.pos[b, h] == p).nonzero().item()
                del self.slots[b][h][p]
        self.store.drop(at)

    def reorder(self, rows: list[int]) -> None:
        self.store.reorder(torch.tensor(rows))
        self.slots = [[{p: dict(s) for p, s in held.items()} for held in self.slots[r]] for r in rows]
        self.seen = self.seen[rows]

    def heads(self) -> list[dict[int, dict[str, Any]]]:
        return [held for row in self.slots for held in row]

    def places(self):
        """Row, head, slot and position of all that is held in the model."""
        pos = self.store.pos.tolist()
        for b in range(B):
            for h in range(H):
                for s, p in enumerate(pos[b][h]):
                    if p in self.slots[b][h]:
                        yield b, h, s, p

    def check(self) -> None:
        """The store holds every slot of the model, once, with its keys, values and side arrays, and nothing else."""
        pos = self.store.pos
        arrays = dict(zip(("k", "v"), self.store.read(), strict=True))
        arrays |= {name: self.store.track(name) for name in self.side}
        assert all(x.shape[:3] == pos.shape for x in arrays.values())
        for b in range(B):
            for h in range(H):
                places = [(s, p) for s, p in enumerate(pos[b, h].tolist()) if p >= 0]
                assert sorted(p for _, p in places) == sorted(self.slots[b][h])
                assert not self.store.in_order or places == sorted(places, key=lambda place: place[1])
                assert self.store.layout(2) == "positions" or (self.store.in_order and len(places) == pos.shape[2])
                for name, array in arrays.items() if places else ():
                    expected = [self.slots[b][h][p][name] for _, p in places]
                    expected = torch.stack(expected) if name in ("k", "v") else torch.tensor(expected)
                    off = bound(torch.float32, 64, size=expected.abs().max().item())  # sums, where something was added
                    near(array[b, h, [s for s, _ in places]], expected, off)

    def check_attend(self, T: int, rules: Rules) -> None:
        """Append T tokens and attend with their queries: the formula over each head's own set."""
        k, v, pos = self.append(T)
        q = torch.randn(B, HQ, T, D, generator=self.g) * 2
        step = Step(0, 1, Stage.TURN, q, k, v, pos, self.seen - T, False, torch.arange(B), rules)
        out = self.store.attend(step)
        longest = max(map(len, self.heads()))
        k_pos = torch.full((B, H, longest), -1)
        k, v = torch.zeros(B, H, longest, D), torch.zeros(B, H, longest, D)
        for b in range(B):
            for h in range(H):
                for s, (p, slot) in enumerate(self.slots[b][h].items()):
                    k_pos[b, h, s], k[b, h, s], v[b, h, s] = p, slot["k"], slot["v"]
        near(out, formula(q, k, v, rules, pos, k_pos), allowed(q, k, rules, pos, k_pos, v))


EQUAL = [[7, 7]] * B
PER_ROW = [[5, 5], [9, 9], [2, 2]]
PER_HEAD = [[5, 37], [16, 1], [2, 17]]
PADDED = (0, 4, 11)


def cases(kind: type[Store]) -> list[list[list[int]]]:
    return [EQUAL, PER_ROW, PER_HEAD] if kind is RaggedStore else [EQUAL, PER_ROW]


BOTH = [(kind, counts) for kind in (Store, RaggedStore) for counts in cases(kind)]
IDS = [
    f"{kind.__name__}-{name}"
    for kind in (Store, RaggedStore)
    for name in ("equal", "per row", "per head")[: len(cases(kind))]
]


@pytest.mark.parametrize("padding", [(0,) * B, PADDED], ids=["unpadded", "padded"])
@pytest.mark.parametrize("capacity", [None, 90])
@pytest.mark.parametrize(("kind", "counts"), BOTH, ids=IDS)
def test_every_operation_moves_keys_values_and_side_arrays_together(kind, counts, capacity, padding):
    both = Lists(kind, capacity=capacity)
    both.append(45, padding)
    both.track("mass", 0.5)
    both.add("mass")
    both.append(3)
    both.check()
    both.keep(counts)
    both.check()
    both.append(1)
    both.add("mass")
    both.check()
    both.append(4, (0, 2, 1))
    both.track("late", 2.0)
    both.reorder([2, 0, 0])
    both.check()
    both.add("late")
    both.drop()
    both.reorder([2, 1, 0])
    both.check()
    both.append(1)
    both.check()
    both.add("mass")
    both.drop()
    both.append(5)
    both.check()
    both.keep([[min(3, len(held)) for held in row] for row in both.slots])
    both.append(2)
    both.check()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("padding", [(0,) * B, PADDED], ids=["unpadded", "padded"])
@pytest.mark.parametrize(("kind", "counts"), BOTH, ids=IDS)
def test_attention_sees_each_heads_set_and_nothing_else(kind, counts, padding, rules):
    both = Lists(kind, seed=1)
    both.append(45, padding)
    both.check_attend(1, RULES[rules])  # nothing dropped yet
    both.check_attend(3, RULES[rules])
    both.keep(counts)
    both.check_attend(1, RULES[rules])
    both.check_attend(1, RULES[rules])
    both.check_attend(4, RULES[rules])
    both.drop()
    both.check_attend(1, RULES[rules])  # the token fills the free slot
    both.reorder([1, 1, 2])
    both.drop()
    both.check_attend(3, RULES[rules])
    both.keep([[min(4, len(held)) for held in row] for row in both.slots])
    both.check_attend(1, RULES[rules])


@pytest.mark.parametrize(
    ("kind", "counts"), [(Store, EQUAL), (RaggedStore, EQUAL), (RaggedStore, [[3, 0], [16, 1], [0, 0]])]
)
def test_a_hole_in_the_last_head_and_one_in_the_tail_are_both_filled(kind, counts):
    both = Lists(kind)
    both.append(20)
    both.track("mass", 0.0)
    both.keep(counts)
    both.append(6)
    both.add("mass")
    n = len(both.store)
    for _ in range(40):  # by chance in the pages of some heads and in the tail of others
        both.drop()
        both.append(1)
        both.check()
    assert len(both.store) == n


@pytest.mark.parametrize("kind", [Store, RaggedStore])
def test_a_second_hole_is_refused(kind):
    both = Lists(kind)
    both.append(20)
    both.keep(EQUAL)
    both.drop()
    with pytest.raises(AssertionError, match="second free slot"):
        both.drop()


def held(store: Store) -> int:
    return nbytes(store.tensors())


@pytest.mark.parametrize("capacity", [None, 20, 300])
def test_dropped_slots_are_freed(capacity):
    both = Lists(Store, capacity=capacity)
    both.append(20)
    both.append(280)
    both.track("mass", 0.0)
    both.keep([[100, 100]] * B)
    slot = 2 * D * 4 + 4 + 4  # keys and values in float32, position, one side array
    assert held(both.store) == B * H * 100 * slot
    assert both.store.overhead() == B * H * 100 * 8
    both.keep([[10, 10]] * B)
    assert held(both.store) == B * H * 10 * slot


def test_the_newest_slots_are_kept_in_memory_of_their_own():
    store = Store()
    k, pos = torch.randn(B, H, 50, D), torch.arange(50).expand(B, -1)
    store.append(k, k, pos)
    store.keep_newest(8)
    assert held(store) == B * H * 8 * 2 * D * 4 + B * 8 * 4  # nothing dropped by head: one position for all heads
    assert torch.equal(store.k, k[:, :, 42:]) and store.pos[0, 0].tolist() == list(range(42, 50))
    store.keep_newest(20)
    assert len(store) == 8


def test_padding_between_slots_does_not_count_among_the_newest():
    both = Lists(Store)
    both.append(10, (0, 4, 7))
    both.append(6, (0, 1, 5))
    pos = both.store.pos[:, 0]
    both.store.keep_newest(3)
    # the last row's newest three: one of the later six columns, two of the earlier ten
    assert torch.equal(both.store.pos[:, 0], pos[:, 8:])
    assert both.store.pos[2, 0].tolist() == [1, 2, -1, -1, -1, -1, -1, 3]
    assert both.store.padded
    both.store.keep_newest(1)
    assert both.store.pos[:, 0].tolist() == [[15], [10], [3]] and not both.store.padded


def test_a_view_of_a_larger_tensor_is_not_held():
    fused = torch.randn(B, 3 * H, 50, D)
    store = Store()
    store.append(fused[:, :H], fused[:, H : 2 * H], torch.arange(50).expand(B, -1))
    assert held(store) == 2 * B * H * 50 * D * 4 + B * 50 * 4
    assert torch.equal(store.k, fused[:, :H])


def test_a_tensor_that_is_ours_alone_is_not_copied():
    k, v = torch.randn(B, H, 50, D), torch.randn(B, 50, H, D).transpose(1, 2)
    store = Store()
    store.append(k, v, torch.arange(50).expand(B, -1))
    assert store.k.data_ptr() == k.data_ptr() and store.v.data_ptr() == v.data_ptr()
    store.append(k[:, :, :1], v[:, :, :1], torch.full((B, 1), 50))
    assert torch.equal(k, store.k[:, :, :50])  # growing leaves the model's tensor alone


NEW = 192


@pytest.mark.parametrize("kind", [Store, RaggedStore])
@pytest.mark.parametrize("keep", [True, False])
def test_decoding_copies_the_cache_once_in_many_tokens(kind, keep):
    both = Lists(kind)
    both.append(20)
    both.track("mass", 0.0)
    if keep:
        both.keep(EQUAL)
    copied, before = 0, None
    for _ in range(NEW):
        n = both.store.n
        both.append(1)
        now = tuple(b.data_ptr() for b in both.store.buffers.values())
        copied += n * (now != before)
        before = now
        assert both.store.buffers["k"].shape[2] - both.store.n <= max(1, n // 8)
    assert copied < 9 * both.store.n  # places: as many as there are, and an eighth, a sixty-fourth, … less each time
    both.check()


def test_free_places_are_padding_and_no_row_pays_for_them():
    both, slot = Lists(Store), 2 * D * 4 + 4
    both.append(200)
    both.keep([[160, 160]] * B)
    both.append(1)
    assert held(both.store) == B * H * (161 + 20) * slot
    holding = both.store.holding()
    assert holding.held == [H * 161 * slot] * B and holding.beside == [H * 161 * 4] * B
    assert holding.padding == [H * 20 * slot] * B
    assert both.store.overhead() == B * H * (161 * 4 + 20 * slot)


@pytest.mark.parametrize("to_come", [1, 2, 5])
def test_no_place_is_made_for_a_token_that_will_not_come(to_come):
    both = Lists(Store)
    both.append(200)
    both.keep([[160, 160]] * B)
    both.store.expect(to_come)
    for _ in range(to_come):
        both.append(1)
        assert both.store.buffers["k"].shape[2] == 160 + to_come
    both.append(1)  # it came all the same
    assert both.store.buffers["k"].shape[2] == 161 + to_come + spare(160 + to_come)
    both.check()


def test_a_capacity_is_room_for_the_prompt_and_no_more():
    both = Lists(Store, capacity=30)
    both.append(10)
    before = both.store.k.data_ptr()
    assert held(both.store) == 30 * (B * H * 2 * D * 4 + B * 4)
    both.append(20)
    assert both.store.k.data_ptr() == before
    assert held(both.store) == 30 * (B * H * 2 * D * 4 + B * 4)
    both.check()


def test_rows_with_fewer_slots_are_filled_up_with_padding():
    both = Lists(Store)
    both.append(20)
    both.keep(PER_ROW)
    assert (both.store.pos >= 0).sum(-1).tolist() == PER_ROW
    assert both.store.padded and len(both.store) == 9
    both.keep([[2, 2]] * B)
    assert not both.store.padded


@pytest.mark.parametrize("kind", [Store, RaggedStore])
def test_everything_may_be_dropped(kind):
    both = Lists(kind)
    both.append(20)
    both.keep([[0, 0]] * B)
    assert both.store.overhead() == 0 or kind is RaggedStore
    both.check()
    both.check_attend(1, RULES["plain"])
    both.check_attend(3, RULES["plain"])
    both.check()


def test_the_newest_of_each_row_stay_whatever_padding_stands_between_them():
    store = Store()
    k = torch.zeros(2, 1, 10, 4)
    pos = torch.tensor([list(range(10)), [0, 1, 2, 3, -1, -1, -1, -1, 4, 5]])
    store.append(k, k, pos, padded=True)
    store.keep_newest(3, slack=7)
    assert len(store) == 10  # no more than the slack
    store.keep_newest(3)
    assert [row[0][row[0] >= 0].tolist() for row in store.pos] == [[7, 8, 9], [3, 4, 5]]
    assert store.counted() == [3, 3]
