"""AdaKV against cases worked by hand, and what has to hold for any scores."""

import pytest
import torch

from methods import load_method
from methods.adakv import AdaKV, best
from methods.core.allocate import Uniform
from methods.core.errors import UserError
from methods.core.meter import nbytes
from tests.bounds import bound, near, run_off
from tests.methods.conftest import kept, run

ROWS = torch.tensor(
    [[0.30, 0.25, 0.20, 0.15, 0.06, 0.04], [0.70, 0.10, 0.08, 0.06, 0.04, 0.02], [0.50, 0.26, 0.12, 0.08, 0.03, 0.01]]
)[None]


def counts(keep: torch.Tensor) -> list[int]:
    return keep.sum(-1)[0].tolist()


def pick(n: int, scores: torch.Tensor = ROWS, **knobs) -> torch.Tensor:
    return AdaKV(**knobs).pick(scores, torch.tensor([n]))


@pytest.mark.parametrize(
    ("n", "alpha", "safeguard", "expected"),
    [
        (2, 0.0, "blend", [3, 1, 2]),
        (2, 0.2, "blend", [3, 1, 2]),
        (2, 0.2, "release", [2, 1, 2]),  # one slot short
        (2, 0.2, "reserve", [3, 1, 2]),
        (2, 0.5, "blend", [3, 1, 2]),  # 2.5, 1.5, 2: the lower head takes the slot that is left
        (2, 0.5, "release", [2, 2, 2]),
        (2, 0.5, "reserve", [3, 1, 2]),
        (2, 1.0, "blend", [2, 2, 2]),
        (2, 1.0, "release", [2, 2, 2]),
        (2, 1.0, "reserve", [2, 2, 2]),
        (3, 0.0, "blend", [4, 2, 3]),
        (3, 0.2, "blend", [4, 2, 3]),
        (3, 0.2, "release", [3, 2, 2]),  # two slots short
    ],
)
def test_hand_worked_counts(n, alpha, safeguard, expected):
    keep = pick(n, alpha=alpha, safeguard=safeguard)
    assert counts(keep) == expected
    assert keep[0].tolist() == [[i < count for i in range(6)] for count in expected]  # each head's own best


def test_hand_worked_mass():
    near(ROWS[pick(2, alpha=0.0)].sum(), 2.21, bound(torch.float32, 6, size=2.21))
    near(ROWS[Uniform().pick(ROWS, torch.tensor([2]))].sum(), 2.11, bound(torch.float32, 6, size=2.21))


def random_scores(seed: int, B: int = 3, H: int = 5, S: int = 40) -> torch.Tensor:
    """Rows like attention: sharp in some heads, flat in others."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, H, S, generator=g) * torch.rand(B, H, 1, generator=g) * 5).softmax(-1)


@pytest.mark.parametrize("safeguard", ["blend", "reserve"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.2, 0.29, 0.5, 0.77, 1.0])
def test_the_sum_is_exact_and_every_head_has_its_floor(alpha, safeguard):
    n = torch.tensor([3, 11, 27])
    for seed in range(20):
        got = AdaKV(alpha, safeguard).pick(random_scores(seed), n).sum(-1)
        assert got.sum(-1).tolist() == (5 * n).tolist()
        assert (got >= (alpha * n[:, None]).floor()).all()


def test_an_even_split_keeps_what_the_base_method_keeps():
    scores, n = random_scores(1), torch.tensor([3, 11, 27])
    for safeguard in ("blend", "reserve", "release"):
        assert torch.equal(AdaKV(1.0, safeguard).pick(scores, n), Uniform().pick(scores, n))


def test_without_a_floor_the_layer_keeps_its_best_and_never_less_mass():
    scores, n = random_scores(2), torch.tensor([3, 11, 27])
    keep = AdaKV(0.0).pick(scores, n)
    for row, size in enumerate((5 * n).tolist()):
        lowest = scores[row].flatten().topk(size).values[-1]
        assert torch.equal(keep[row], scores[row] >= lowest)
    even = Uniform().pick(scores, n)
    assert ((scores * keep).sum((1, 2)) > (scores * even).sum((1, 2))).all()


def test_heads_in_another_order_take_their_slots_along():
    scores, n, order = random_scores(3), torch.tensor([3, 11, 27]), torch.tensor([4, 2, 0, 1, 3])
    # without slots to round, no order breaks a tie
    assert torch.equal(AdaKV(0.0).pick(scores[:, order], n), AdaKV(0.0).pick(scores, n)[:, order])


@pytest.mark.parametrize("safeguard", ["blend", "reserve", "release"])
def test_identical_heads_share_evenly(safeguard):
    scores = random_scores(4, B=1, H=1).expand(1, 4, -1)
    for n in (5, 10, 20):
        assert counts(pick(n, scores, safeguard=safeguard)) == [n] * 4


def test_equal_parts_of_a_slot_are_equal_whatever_binary_makes_of_them():
    # 0.4, 1.2 and 4.4 slots: the one that is left goes to the lower head of two
    assert AdaKV(0.2).counts(torch.tensor([[2, 2, 2]]), torch.tensor([[0, 1, 5]])).tolist() == [[1, 1, 4]]


def test_a_head_in_which_more_stays_than_its_part_takes_nothing_from_the_others():
    scores = torch.cat((ROWS[:, :2], torch.full((1, 2, 4), -torch.inf)), dim=-1)
    scores[0, 0, :4] = torch.inf
    assert counts(pick(2, scores)) == [4, 2]


def test_at_equal_scores_the_lower_head_wins_then_the_lower_slot():
    keep = best(torch.ones(1, 2, 3), torch.tensor([4]))
    assert keep.tolist() == [[[True, True, True], [True, False, False]]]


def test_what_stays_in_any_case_is_not_shared_out_and_padding_never_stays():
    scores = torch.cat((torch.full((1, 3, 2), -torch.inf), ROWS, torch.full((1, 3, 4), torch.inf)), dim=-1)
    keep = pick(4 + 2, scores)
    assert counts(keep) == [4 + 3, 4 + 1, 4 + 2]
    assert keep[..., -4:].all() and not keep[..., :2].any()


def test_a_row_that_keeps_everything_keeps_it():
    scores = torch.cat((random_scores(5, B=1), random_scores(6, B=1)))
    keep = AdaKV().pick(scores, torch.tensor([40, 7]))
    assert keep[0].all() and keep[1].sum() == 5 * 7


def adakv(budget: float, window: int = 8, **allocator):
    return load_method("adakv", budget=budget, window=window, allocator=allocator)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_heads_differ_and_what_they_give_up_is_freed(alpha, gqa):
    ids = torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(1))
    ada, even = adakv(0.25, alpha=alpha).cache_for(gqa), load_method("snapkv", budget=0.25, window=8).cache_for(gqa)
    run(gqa, ada, ids)
    run(gqa, even, ids)
    held = [[len(kept(ada, layer, 0, head)) for head in range(2)] for layer in range(2)]
    assert [sum(heads) for heads in held] == [2 * 150] * 2
    assert any(a != b for a, b in held)
    place = 2 * 16 * 4 + 4  # a key, a value and a position
    for ours, theirs, heads in zip(ada.layers, even.layers, held, strict=True):
        # the even split's bytes, where each slot lies, and a head's layout
        assert nbytes(ours.inner.tensors()) == sum(heads) * (place + 4) + 2 * 16
        assert nbytes(theirs.inner.tensors()) == 300 * place
    ada.check_budget()


def test_the_window_stays_in_every_head(gqa):
    ids = torch.randint(1, 97, (1, 120), generator=torch.Generator().manual_seed(2))
    cache = adakv(0.2, alpha=0.0).cache_for(gqa)
    run(gqa, cache, ids)
    for layer in range(2):
        for head in range(2):
            assert kept(cache, layer, 0, head)[-8:] == list(range(112, 120))


def test_an_even_split_under_a_model_gives_the_base_methods_logits(gqa):
    ids, new = torch.arange(90)[None] % 97, torch.arange(6)[None] + 3
    ada = run(gqa, adakv(0.5, alpha=1.0).cache_for(gqa), ids, new=new)
    base = run(gqa, load_method("snapkv", budget=0.5, window=8).cache_for(gqa), ids, new=new)
    near(ada, base, run_off(base))


@pytest.mark.parametrize("knobs", [{"alpha": 1.5}, {"alpha": -0.1}, {"safeguard": "mean"}])
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=f"method.allocator.{next(iter(knobs))}="):
        load_method("adakv", allocator=knobs)
