"""Ragged storage: what heads do not keep is freed, or taken by others. Its answers are tested in test_store.py."""

import copy

import pytest
import torch

from methods.core.contract import Stage
from methods.core.meter import nbytes
from methods.core.stores.ragged import RaggedStore
from tests.methods.layer import step_of

B, H, S, D = 2, 3, 200, 8
COUNTS = [[1, 16, 17], [0, 100, 33]]
PLACE = 2 * D * 4
ENTRY = 4 + 4  # of a slot in pages: its position, and where it lies
NEW = 69  # tokens after the prompt
LAYOUT = B * H * 16  # per head the number of its slots and where its table begins


def filled() -> RaggedStore:
    store = RaggedStore()
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(B, H, S, D, generator=g), torch.randn(B, H, S, D, generator=g)
    store.append(k, v, torch.arange(S).expand(B, -1))
    return store


def mask_of(counts: list[list[int]], S: int = S) -> torch.Tensor:
    """The newest slots of each head."""
    return torch.arange(S) >= S - torch.tensor(counts)[..., None]


def ragged(side: bool = False) -> RaggedStore:
    store = filled()
    if side:
        store.add("mass", torch.arange(S).expand(B, H, S).float())
    store.keep(mask_of(COUNTS), 100)
    return store


def total(counts: list[list[int]]) -> int:
    return sum(n for row in counts for n in row)


@pytest.mark.parametrize("side", [False, True])
def test_each_head_pays_for_its_own_slots_and_no_place_more(side):
    assert nbytes(ragged(side).tensors()) == total(COUNTS) * (PLACE + ENTRY + 4 * side) + LAYOUT


@pytest.mark.parametrize("side", [False, True])
def test_what_is_held_is_the_kept_slots_and_the_documented_overhead(side):
    store = ragged(side)
    kept = sum(n for row in COUNTS for n in row)
    assert nbytes(store.tensors()) == kept * PLACE + store.overhead()
    for i in range(NEW):
        one = torch.randn(B, H, 1, D)
        store.append(one, one, torch.full((B, 1), S + i))
    now = kept + B * H * (NEW)
    assert nbytes(store.tensors()) == now * PLACE + store.overhead()


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_what_a_row_holds_beside_its_slots_is_their_layout(count):
    counts = [[count, 1, 3], [16, count, count]]
    store = filled()
    store.keep(mask_of(counts), max(max(row) for row in counts))
    holding = store.holding()
    for row, own, beside, padding in zip(counts, holding.held, holding.beside, holding.padding, strict=True):
        assert own - beside == sum(row) * PLACE
        assert beside == sum(row) * ENTRY + LAYOUT // B and padding == 0


def test_pages_belong_to_their_head_after_rows_change_places():
    store = ragged()
    before = store.pos
    store.reorder(torch.tensor([1, 1]))
    assert torch.equal(store.pos, before[[1, 1]])
    assert nbytes(store.tensors()) == 2 * sum(COUNTS[1]) * (PLACE + ENTRY) + LAYOUT
    store.reorder(torch.tensor([0, 1]))
    assert torch.equal(store.pos, before[[1, 1]])


def test_a_row_that_loses_no_slot_lies_as_before():
    """How many pages a row has and how many of its slots lie behind them is its own affair."""
    store = ragged()
    new = torch.randn(B, H, 5, D)
    store.append(new, new, torch.arange(S, S + 5).expand(B, -1))
    before, pos = store.holding(), store.pos
    real = pos >= 0
    store.keep(real & ((pos % 2 == 0) | torch.tensor([True, False])[:, None, None]), 200)
    after = store.holding()
    assert (after.held[0], after.beside[0]) == (before.held[0], before.beside[0])
    assert after.held[1] < before.held[1]
    assert sum(after.held) + sum(after.padding) == nbytes(store.tensors())
    for row, kept in enumerate((real, real & (pos % 2 == 0))):
        assert [sorted(h[h >= 0].tolist()) for h in store.pos[row]] == [
            p[k].tolist() for p, k in zip(pos[row], kept[row])
        ]
    assert torch.equal(store.read()[0][:, :, -5:][0], new[0])


def test_a_second_keep_takes_from_pages_and_tail_alike_and_frees_the_rest():
    store = ragged(side=True)
    new = torch.randn(B, H, 30, D)
    store.append(new, new, torch.arange(S, S + 30).expand(B, -1))
    pos = store.pos
    store.keep((pos % 2 == 0) & (pos >= 0), 200)
    counts = [[(S + 29) // 2 - (S - n - 1) // 2 for n in row] for row in COUNTS]
    assert [[(h >= 0).sum().item() for h in row] for row in store.pos] == counts
    assert (store.pos.remainder(2) == 0)[store.pos >= 0].all()
    # they are more slots than before, so that places were made, an eighth of them for what may come
    places = total(counts) + total(counts) // 8
    assert nbytes(store.tensors()) == places * (PLACE + 8) + total(counts) * 4 + LAYOUT
    mass = store.track("mass")
    expected = torch.where(store.pos < S, store.pos, 0).float()
    assert torch.equal(mass[store.pos >= 0], expected[store.pos >= 0])


def test_a_side_array_that_is_forgotten_is_freed_and_starts_anew():
    store = ragged(side=True)
    store.forget("mass")
    assert nbytes(store.tensors()) == nbytes(ragged().tensors())
    assert not store.track("mass").any()


def test_the_number_of_slots_is_that_of_the_longest_head():
    store = ragged()
    assert len(store) == 100 and store.pos.shape == (B, H, 100)
    one = torch.randn(B, H, 1, D)
    store.append(one, one, torch.full((B, 1), S))
    assert len(store) == 101 and store.pos[..., -1].tolist() == [[S] * H] * B


def test_decoding_leaves_the_pages_where_they_are():
    store = ragged(side=True)
    before = {name: page.data_ptr() for name, page in store.pages.items()}
    for i in range(2 * NEW):
        one = torch.randn(B, H, 1, D)
        store.append(one, one, torch.full((B, 1), S + i))
        store.add("mass", torch.ones(B, H, len(store)))
    assert {name: page.data_ptr() for name, page in store.pages.items()} == before


def test_until_the_first_keep_it_is_a_rectangle():
    store = filled()
    assert not store.pages
    assert nbytes(store.tensors()) == B * H * S * PLACE + B * S * 4


def copied(store: RaggedStore) -> dict[str, int]:
    """Where the pages' arrays lie."""
    return {name: page.data_ptr() for name, page in store.pages.items()}


def kept_by(store: RaggedStore) -> list[list[list[tuple]]]:
    """Position, first channel of key and value, and mass of every head's slots, in order."""
    k, v = store.read()
    x = torch.stack((store.pos.float(), k[..., 0], v[..., 0], store.track("mass")), -1)
    return [[[tuple(slot) for slot in head[head[:, 0] >= 0].tolist()] for head in row] for row in x]


def test_a_later_keep_moves_new_slots_into_the_places_of_old_ones_whichever_head_they_were_of():
    """Against a store that is gathered anew; heads grow and shrink, and their sum stays the same."""
    store, g = ragged(side=True), torch.Generator().manual_seed(3)
    expected, at = kept_by(store), None
    for turn in range(12):
        for i in range(16):
            new = torch.randn(B, H, 1, D, generator=g)
            now = S + 16 * turn + i
            store.append(new, new, torch.full((B, 1), now))
            for b in range(B):
                for h in range(H):
                    expected[b][h].append((float(now), new[b, h, 0, 0].item(), new[b, h, 0, 0].item(), 0.0))
        gain = torch.randint(9, (B, H, len(store)), generator=g).float()
        store.add("mass", gain)
        # all heads together keep as many as before: rows do too, heads do not
        scores = torch.where(store.pos >= 0, torch.rand(B, H, len(store), generator=g), -1.0)
        n = torch.tensor([sum(row) for row in COUNTS])
        rank = scores.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)
        mask = (rank < n[:, None]).view(B, H, -1)
        real = store.pos >= 0
        for b in range(B):
            for h in range(H):
                more, stays = gain[b, h][real[b, h]].tolist(), mask[b, h][real[b, h]].tolist()
                slots = [(p, k, v, m + x) for (p, k, v, m), x in zip(expected[b][h], more, strict=True)]
                expected[b][h] = [slot for slot, stay in zip(slots, stays, strict=True) if stay]
        store.keep(mask, int(mask.sum(-1).max()))
        assert kept_by(store) == expected
        assert store.counts == [len(head) for row in expected for head in row]
        assert at in (None, copied(store)), "pages were made anew"
        at = copied(store)
        assert nbytes(store.tensors()) == total(COUNTS) * (PLACE + ENTRY + 4) + LAYOUT


def test_free_places_are_an_eighth_at_most_and_padding():
    store, g = ragged(), torch.Generator().manual_seed(3)
    most = 0
    for turn in range(40):
        new = torch.randn(B, H, 1, D, generator=g)
        store.append(new, new, torch.full((B, 1), S + turn))
        # every row grows by a slot a turn, then shrinks
        n = torch.tensor([sum(row) for row in COUNTS]) + (turn if turn < 20 else 20 - 2 * (turn - 20))
        scores = torch.where(store.pos >= 0, torch.rand(B, H, len(store), generator=g), -1.0)
        rank = scores.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)
        store.keep((rank < n[:, None]).view(B, H, -1), 300)
        held = total([store.counts])
        free = len(store.pages["pos"]) - held
        most = max(most, free)
        assert 0 <= free <= held // 8
        holding = store.holding()
        assert sum(holding.held) == held * (PLACE + ENTRY) + LAYOUT
        assert sum(holding.held) + sum(holding.padding) == nbytes(store.tensors())
        assert held == n.sum() == len(set(store.at.tolist()))
    assert most > 0


def test_what_lies_in_a_free_place_is_read_by_nobody():
    store, g = ragged(side=True), torch.Generator().manual_seed(4)
    step = step_of(1, 2 * H, H, D, rows=B, stage=Stage.DECODE, start=S)
    store.append(step.k, step.v, step.pos)
    store.keep((store.pos >= 0) & ((store.pos % 50 != 2) | (store.pos >= S)), 100)
    twin = copy.deepcopy(store)
    free = torch.ones(len(store.pages["pos"]), dtype=torch.bool).index_fill(0, store.at.long(), False)
    assert free.any()
    for name, x in store.pages.items():
        x[free] = 7 if name == "pos" else torch.nan
    for T in (1, 2):
        new = step_of(T, 2 * H, H, D, rows=B, stage=Stage.TURN, start=S + T)
        for one in (store, twin):
            one.append(new.k, new.v, new.pos)
        assert torch.equal(store.attend(new), twin.attend(new))
        for ours, theirs in zip(store.attend_with_mass(new, 1), twin.attend_with_mass(new, 1), strict=True):
            assert torch.equal(ours, theirs)
    for change in (lambda s: s.drop(torch.full((B, H), 3)), lambda s: s.reorder(torch.tensor([1, 0]))):
        change(store), change(twin)
        assert torch.equal(store.pos, twin.pos) and kept_by(store) == kept_by(twin)
    mask = (store.pos >= 0) & (torch.rand(store.pos.shape, generator=g) < 0.5)
    store.keep(mask, 100), twin.keep(mask, 100)
    assert torch.equal(store.pos, twin.pos) and kept_by(store) == kept_by(twin)


def test_no_more_places_are_made_than_tokens_will_come():
    for to_come, more in ((None, 1000), (2, 2 * B * H)):
        store = ragged()
        for i in range(2):
            one = torch.randn(B, H, 1, D)
            store.append(one, one, torch.full((B, 1), S + i))
        store.expect(to_come or 0)
        real = store.pos >= 0
        first = torch.zeros_like(real).scatter(2, real.int().argmax(-1, keepdim=True), True)
        store.keep(real & ~(first & (store.pos < S)), 200)
        held = total([store.counts])
        assert len(store.pages["pos"]) - held == min(held // 8, more)


def test_padding_is_no_slot():
    store = ragged()
    assert (store.pages["pos"] >= 0).sum().item() == total(COUNTS)
    assert (store.pos >= 0).sum(-1).tolist() == COUNTS


def test_side_arrays_of_any_type_and_width_follow_their_slots():
    store = filled()
    store.track("votes", 7.0, (3,), torch.uint8)
    store.add("votes", torch.arange(S)[:, None].expand(B, H, S, 3).to(torch.uint8))
    for start in (S, S + 20):
        new = torch.randn(B, H, 20, D)
        store.append(new, new, torch.arange(start, start + 20).expand(B, -1))
        store.keep((store.pos >= 0) & (store.pos % 3 != 0), 300)
        store.add("votes", torch.ones_like(store.track("votes", 7.0, (3,), torch.uint8)))
    pos, votes = store.pos, store.track("votes", 7.0, (3,), torch.uint8)
    expected = 7 + torch.where(pos < S, pos, 0) + torch.where(pos < S + 20, 2, 1)
    assert votes.dtype == torch.uint8 and votes.shape == (*pos.shape, 3)
    assert (votes == expected.to(torch.uint8)[..., None])[pos >= 0].all()
    holding = store.holding()
    assert sum(holding.held) + sum(holding.padding) == nbytes(store.tensors())
