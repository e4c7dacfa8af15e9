"""Ragged storage: what heads do not keep is freed, and pages stay whole. Its answers are tested in test_store.py."""

import pytest
import torch

from methods.core.meter import nbytes
from methods.core.stores.ragged import PAGE, RaggedStore

B, H, S, D = 2, 3, 200, 8
COUNTS = [[1, 16, 17], [0, 100, 33]]
PLACE = 2 * D * 4
NEW = 69  # tokens after the prompt
LAYOUT = B * H * 16  # per head the number of its slots and where its pages begin


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


def n_pages(counts: list[list[int]]) -> int:
    return sum(-(-n // PAGE) for row in counts for n in row)


@pytest.mark.parametrize("side", [False, True])
def test_each_head_pays_for_its_own_pages(side):
    store = ragged(side)
    pages = n_pages(COUNTS)
    assert pages == 1 + 1 + 2 + 0 + 7 + 3
    expected = pages * PAGE * (PLACE + 4 + 4 * side) + pages * 8 + LAYOUT  # a page's owner is an int64
    assert nbytes(store.tensors()) == expected


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
def test_a_heads_unused_places_are_fewer_than_a_page_and_documented_on_top(count):
    counts = [[count, 1, 3], [16, count, count]]
    store = filled()
    store.keep(mask_of(counts), max(max(row) for row in counts))
    holding = store.holding()
    for row, own, beside, padding in zip(counts, holding.held, holding.beside, holding.padding, strict=True):
        unused = sum(-n % PAGE for n in row)
        assert own - beside == sum(row) * PLACE and unused <= len(row) * (PAGE - 1)
        pages = (sum(row) + unused) // PAGE
        assert beside == unused * PLACE + (sum(row) + unused) * 4 + pages * 8 + LAYOUT // B and padding == 0


def test_pages_belong_to_their_head_after_rows_change_places():
    store = ragged()
    before = store.pos
    store.reorder(torch.tensor([1, 1]))
    assert torch.equal(store.pos, before[[1, 1]])
    assert nbytes(store.tensors()) == n_pages([COUNTS[1]] * 2) * (PAGE * (PLACE + 4) + 8) + LAYOUT
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
    assert nbytes(store.tensors()) == n_pages(counts) * (PAGE * (PLACE + 8) + 8) + LAYOUT
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


def test_padding_in_the_last_page_is_no_slot():
    store = ragged()
    real = store.pages["pos"] >= 0
    assert real.sum().item() == sum(n for row in COUNTS for n in row)
    owners = torch.bincount(store.page_row.repeat_interleave(PAGE)[real.flatten()], minlength=B * H)
    assert owners.view(B, H).tolist() == COUNTS
