"""Statistics against closed forms and scipy."""

import numpy as np
import pytest
from scipy import stats as reference

from analysis import stats

ONE = np.ones


def ids(n):
    return [f"qa/{i:03}" for i in range(n)]


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def test_subsets_weigh_as_a_mean_of_category_means_or_of_subset_means():
    assert stats.subset_weights(["x", "x", "y"]).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert stats.subset_weights(["x", "x", "y"], "subsets").tolist() == pytest.approx([1 / 3] * 3)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).normal(size=400)
    found = stats.estimate(stats.bootstrap(column(values), ONE(400), ids(400), "a", 8000)[:, 0])
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(values.mean(), abs=0.2 * half)


def test_the_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=60)
    found = stats.estimate(stats.bootstrap(column(values), ONE(60), ids(60), "a", 20_000)[:, 0])
    theirs = reference.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile").confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_a_weighted_bootstrap_is_that_of_a_ratio_of_sums():
    rng = np.random.default_rng(3)
    values, tokens = rng.normal(3, 1, size=50), rng.integers(1, 9, size=50).astype(float)
    found = stats.estimate(stats.bootstrap(column(values), tokens, ids(50), "a", 20_000)[:, 0])

    def mean(value, weight, axis=-1):
        return (value * weight).sum(axis) / weight.sum(axis)

    theirs = reference.bootstrap((values, tokens), mean, n_resamples=20_000, method="percentile", paired=True)
    ends = theirs.confidence_interval
    assert found.value == pytest.approx(np.average(values, weights=tokens))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=0.01)


def test_draws_are_paired_across_columns_and_repeat_by_key_and_seed():
    values = np.random.default_rng(4).normal(size=(30, 1))
    both = stats.bootstrap(np.hstack([values, values + 1]), ONE(30), ids(30), "a", 100)
    assert both[:, 1] - both[:, 0] == pytest.approx(1)
    assert stats.bootstrap(values, ONE(30), ids(30), "a", 100)[:, 0] == pytest.approx(both[:, 0])
    assert (stats.bootstrap(values, ONE(30), ids(30), "b", 100)[1:, 0] != both[1:, 0]).any()
    assert (stats.bootstrap(values, ONE(30), ids(30), "a", 100, seed=1)[1:, 0] != both[1:, 0]).any()


def test_drawing_a_few_resamples_at_a_time_changes_nothing(monkeypatch):
    values = np.random.default_rng(5).normal(size=(30, 2))
    whole = stats.bootstrap(values, ONE(30), ids(30), "a", 50)
    signs = stats.signed(values, ONE(30), ids(30), "a", 2000)
    monkeypatch.setattr(stats, "ROOM", 30 * 7)
    assert stats.bootstrap(values, ONE(30), ids(30), "a", 50) == pytest.approx(whole)
    blocks = stats.signed(values, ONE(30), ids(30), "a", 2000)
    assert blocks.shape == (2001, 2) and (blocks[0] == signs[0]).all()
    assert blocks[1:].std(axis=0) == pytest.approx(np.sqrt((values**2).sum(axis=0)) / 30, rel=0.06)


def test_flips_count_both_directions_and_their_p_is_the_binomial_one():
    full, ours = np.array([1, 1, 1, 1, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 0, 0, 1, 1.0])
    assert stats.flips(ours, full) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert stats.flips(full, full) == (0, 0, 1.0)
    # a score of a half is solved
    assert stats.flips(np.array([0.49, 0.5]), np.array([0.5, 0.49]))[:2] == (1, 1)


@pytest.mark.parametrize(("lost", "won"), [(0, 1), (3, 3), (12, 4), (0, 40), (70, 51)])
def test_the_p_of_flips_is_scipys(lost, won):
    full = np.array([1.0] * lost + [0.0] * won + [1.0] * 5)
    ours = np.array([0.0] * lost + [1.0] * won + [1.0] * 5)
    assert stats.flips(ours, full)[2] == pytest.approx(reference.binomtest(lost, lost + won).pvalue)


def p_of(differences, resamples=20_000):
    d = column(differences)
    return stats.p_value(stats.signed(d, ONE(len(d)), ids(len(d)), "a", resamples)[:, 0], d[:, 0] / len(d))


def test_the_sign_test_is_the_exact_one_for_few_samples():
    assert p_of([1.0] * 5) == pytest.approx(2 / 32, abs=0.005)
    assert p_of([0.0] * 5) == 1.0


def test_the_sign_test_agrees_with_scipys_permutation_test():
    d = np.random.default_rng(6).normal(0.4, 1, size=14)
    theirs = reference.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert p_of(d) == pytest.approx(theirs.pvalue, abs=0.005)


def test_a_large_difference_is_not_bounded_by_how_many_signs_were_drawn():
    # 60 samples lost and none won: the exact p is 2 / 2^60, far below one in 201
    p = p_of([-1.0] * 60, resamples=200)
    assert 2 / 2**60 <= p == pytest.approx(2 * np.exp(-30), rel=1e-6, abs=0)
    assert p_of([-1.0] * 4, resamples=200) == pytest.approx(2 / 16, abs=0.08)  # there the bound says less


def test_a_share_of_nothing_is_not_a_number_to_print():
    assert stats.retained(ONE(51), np.zeros(51)) is None
    half = stats.retained(np.full(51, 0.5), ONE(51))
    assert half is not None and (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))


def test_an_interval_is_the_middle_of_what_was_drawn_without_the_value_itself():
    found = stats.estimate(np.concatenate([[1000.0], np.arange(101.0)]))
    assert (found.value, found.low, found.high) == pytest.approx((1000.0, 2.5, 97.5))
    assert stats.Estimate(1.0, 0.0, 2.0).is_tie and not stats.Estimate(1.0, 0.1, 2.0).is_tie


def test_the_area_is_a_mean_over_the_logarithm_of_the_share():
    # from 0.01 to 0.1 nothing fits, from 0.1 to 1 the score is 80
    assert stats.area(np.array([0.1]), np.array([80.0]), 0.01) == pytest.approx(40.0)
    assert stats.area(np.array([0.1, 0.01]), np.array([80.0, 20.0]), 0.01) == pytest.approx(50.0)
    # a worse score at a greater share does not take back what fitted before
    assert stats.area(np.array([0.1, 0.01]), np.array([20.0, 60.0]), 0.01) == pytest.approx(60.0)
    # where lower is better, and below the smallest share, the worst score counts
    expected = (3 * np.log(5) + 2 * np.log(2)) / np.log(10)
    assert stats.area(np.array([0.1, 0.5]), np.array([3.0, 2.0]), 0.1, higher=False) == pytest.approx(expected)
    assert stats.area(np.array([0.1]), np.array([3.0]), 0.01, higher=False) == pytest.approx(3.0)


def test_areas_of_resamples_are_those_of_each():
    share, scores = np.array([0.1, 0.01]), np.array([[80.0, 20.0], [20.0, 60.0]])
    assert stats.area(share, scores, 0.01).tolist() == pytest.approx([50.0, 60.0])


def test_the_front_holds_what_no_other_point_beats():
    share, score = np.array([0.1, 0.2, 0.3, 0.3, 0.1]), np.array([5.0, 4.0, 9.0, 8.0, 5.0])
    assert stats.pareto(share, score).tolist() == [True, False, True, False, True]
    # where lower is better, the two cheapest points are beaten in score by the second only
    assert stats.pareto(share, score, higher=False).tolist() == [True, True, False, False, True]


def test_a_little_more_share_does_not_save_a_point_that_another_beats():
    share, score = np.array([0.099, 0.100, 0.05]), np.array([1.0, 98.0, 0.5])
    assert stats.pareto(share, score).tolist() == [True, True, True]
    assert stats.pareto(share, score, slack=0.02).tolist() == [False, True, True]
    assert stats.pareto(np.array([0.1, 0.1005]), np.array([50.0, 50.0]), slack=0.02).tolist() == [True, False]


def test_of_a_few_samples_all_signs_are_tried_so_that_twelve_alike_stay_clear_of_many_comparisons():
    for n in (1, 2, 5, stats.FEW):
        assert p_of(np.arange(1.0, n + 1), resamples=10) == 2 / 2**n
    d = np.array([0.3, -0.1, 0.7, 0.2, 0.0, 0.0])  # what does not differ says nothing
    signs = np.array([[1 - 2 * (i >> j & 1) for j in range(4)] for i in range(16)])
    assert p_of(d, resamples=10) == np.mean(np.abs(signs @ d[:4]) >= d.sum() - 1e-12)
    assert 41 * p_of([1.0] * stats.FEW) < stats.SURE


def test_no_p_value_is_printed_as_nothing():
    assert [stats.p_text(p) for p in (0.0, 0.0004, 0.0006, 0.385)] == ["<0.001", "<0.001", "0.001", "0.385"]
