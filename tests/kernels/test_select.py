"""Selection worked by hand: stable, and never -inf."""

import pytest
import torch

from kernels import backend, compiled, lowest, top
from kernels.select import compact, put

INF = float("inf")


def row(*scores: float) -> torch.Tensor:
    return torch.tensor([scores])


def kept(scores: torch.Tensor, n: int) -> list[int]:
    return top(scores, torch.tensor([n]))[0].nonzero().flatten().tolist()


def test_the_highest_scores_are_kept():
    assert kept(row(0.1, 0.9, 0.5, 0.7), 2) == [1, 3]


def test_at_equal_scores_the_lower_slot_wins():
    assert kept(row(1.0, 2.0, 1.0, 1.0, 2.0, 1.0), 4) == [0, 1, 2, 4]
    assert kept(torch.zeros(1, 1000), 637) == list(range(637))


def test_minus_infinity_is_never_kept_and_plus_infinity_comes_first():
    assert kept(row(-INF, 0.5, -INF, INF), 3) == [1, 3]
    assert kept(row(0.5, INF, INF, INF), 2) == [1, 2]
    assert kept(row(-INF, -INF), 2) == []


@pytest.mark.parametrize(("n", "expected"), [(0, []), (3, [0, 1, 2]), (9, [0, 1, 2])])
def test_none_all_and_more_than_all_can_be_asked_for(n, expected):
    assert kept(row(0.3, 0.2, 0.1), n) == expected


@pytest.mark.parametrize("S", [1, 63, 1000])
def test_every_row_has_its_own_number(S):
    g = torch.Generator().manual_seed(S)
    scores = torch.randn(3, 2, S, generator=g)
    n = torch.randint(0, S + 1, (3, 2), generator=g)
    keep = top(scores, n)
    assert torch.equal(keep.sum(-1), n)
    lowest_kept = scores.masked_fill(~keep, INF).amin(-1)
    highest_dropped = scores.masked_fill(keep, -INF).amax(-1)
    assert (lowest_kept > highest_dropped).all()


def test_one_number_per_batch_row_holds_for_all_its_heads():
    keep = top(torch.rand(2, 3, 8), torch.tensor([2, 5])[:, None])
    assert keep.sum(-1).tolist() == [[2, 2, 2], [5, 5, 5]]


def test_compact_lists_kept_slots_in_order_and_marks_what_fills_a_row_up():
    keep = torch.tensor([[False, True, False, True, True], [False, False, False, True, False]])
    slots, real = compact(keep, 3)
    assert slots[0].tolist() == [1, 3, 4]
    assert slots[1, 0].item() == 3
    assert real.tolist() == [[True, True, True], [True, False, False]]


@pytest.fixture(params=["reference", "auto"])
def form(request):
    """Both forms of what is asked for at every token; the second is C++ where there is a compiler."""
    chosen = backend.chosen()
    backend.use(request.param)
    yield request.param
    backend.use(chosen)


def test_the_lowest_slot_is_the_newest_at_equal_scores_and_never_padding(form):
    scores = torch.tensor([[[3.0, 1.0, 1.0, 0.5, 2.0], [INF, INF, INF, INF, 9.0]]])
    pos = torch.tensor([[[4, 9, 2, -1, 7], [0, 5, 3, 1, -1]]], dtype=torch.int32)
    slot, odd = lowest(scores, pos)
    assert slot.tolist() == [[1, 1]] and slot.dtype == torch.long and not odd
    assert lowest(scores, torch.full_like(pos, -1))[0].tolist() == [[0, 0]]


def test_the_lowest_slot_is_that_of_a_sort_in_both_forms(form):
    g = torch.Generator().manual_seed(0)
    for B, H, S in ((1, 1, 1), (2, 3, 17), (3, 2, 400)):
        scores = torch.randint(0, 6, (B, H, S + 3), generator=g).float()[..., :S]
        pos = torch.stack([torch.randperm(S, generator=g) for _ in range(B * H)]).view(B, H, S).int()
        pos[torch.rand(B, H, S, generator=g) < 0.3] = -1
        slot, _ = lowest(scores, pos)
        for b in range(B):
            for h in range(H):
                real = [(scores[b, h, i].item(), -pos[b, h, i].item(), i) for i in range(S) if pos[b, h, i] >= 0]
                assert slot[b, h] == (min(real)[2] if real else 0)


def test_scores_that_rank_nothing_ask_for_a_closer_look(form):
    pos = torch.tensor([[[0, 1, -1]]], dtype=torch.int32)
    for scores, odd in (([1.0, 2.0, 3.0], False), ([1.0, float("nan"), 3.0], True), ([1.0, -INF, 3.0], True),
                        ([1.0, 2.0, float("nan")], False), ([1.0, 2.0, -INF], False)):  # fmt: skip
        assert lowest(torch.tensor([[scores]]), pos)[1] is odd


@pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
def test_the_loop_takes_floats_and_whole_positions_alone():
    from kernels.select import compiled as form

    scores, pos = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.int32)
    assert form.serves(scores, pos) and form.serves(scores, pos[:, :1].expand(1, 2, 4))
    assert not form.serves(scores.double(), pos) and not form.serves(scores, pos.long())
    assert not form.serves(scores.mT.contiguous().mT, pos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8])
@pytest.mark.parametrize("rest", [(), (5,), (3, 2)])
def test_a_value_is_put_into_one_place_of_every_head_and_nowhere_else(form, dtype, rest):
    g = torch.Generator().manual_seed(0)
    buffer = torch.randint(0, 9, (2, 3, 7, *rest), generator=g).to(dtype)
    value = torch.randint(10, 20, (3, 2, *rest), generator=g).transpose(0, 1)  # of no order of its own
    slot = torch.randint(0, 7, (2, 3), generator=g)
    expected = buffer.clone()
    for b in range(2):
        for h in range(3):
            expected[b, h, slot[b, h]] = value[b, h].to(dtype)
    for whole in (buffer.clone(), torch.cat((buffer, buffer), dim=2)[:, :, :7]):
        put(whole, slot, value.float())
        assert torch.equal(whole, expected)
