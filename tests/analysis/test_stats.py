"""Statistics against closed forms and scipy."""

import numpy as np
import pytest
from scipy import stats as reference

from analysis import stats


def test_weights_are_those_of_a_mean_of_category_means_of_subset_means():
    w = stats.weights(["a", "a", "b", "c"], ["x", "x", "x", "y"])
    assert w.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_the_interval_of_a_mean_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).normal(size=400)
    own = stats.weights(["a"] * 400, ["x"] * 400)
    found = stats.estimate(values, own, stats.draws(["a"] * 400, ["x"] * 400, 8000))
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_the_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=60)
    own = stats.weights(["a"] * 60, ["x"] * 60)
    low, high = stats.interval(stats.draws(["a"] * 60, ["x"] * 60, 20_000) @ values)
    theirs = reference.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile").confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.03)
    assert own.sum() == pytest.approx(1)


def test_every_draw_keeps_the_weight_of_each_subset():
    drawn = stats.draws(["a", "a", "a", "b", "b"], ["x", "x", "x", "y", "y"], 100)
    assert drawn[:, :3].sum(1) == pytest.approx(0.5) and drawn[:, 3:].sum(1) == pytest.approx(0.5)


def test_flips_count_both_directions_and_their_p_is_the_binomial_one():
    full, ours = np.array([1, 1, 1, 1, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 0, 0, 1, 1.0])
    assert stats.flips(ours, full) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert stats.flips(full, full) == (0, 0, 1.0)


def test_the_sign_test_is_the_exact_one_for_few_samples():
    d = np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    assert stats.p_value(d, np.full(5, 0.2), 20_000) == pytest.approx(2 / 32, abs=0.005)
    assert stats.p_value(np.zeros(5), np.full(5, 0.2)) == 1.0


def test_holm_is_worked_by_hand():
    # sorted 0.01 x 3, 0.02 x 2, 0.04 x 1, then running maxima
    assert stats.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_share_of_nothing_is_not_a_number_to_print():
    own, drawn = stats.weights(["a"] * 3, ["x"] * 3), stats.draws(["a"] * 3, ["x"] * 3, 50)
    assert stats.retained(np.ones(3), np.zeros(3), own, drawn) is None
    half = stats.retained(np.full(3, 0.5), np.ones(3), own, drawn)
    assert half is not None and (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_area_is_a_mean_over_the_logarithm_of_the_share():
    # from 0.01 to 0.1 nothing fits, from 0.1 to 1 the score is 80
    assert stats.area(np.array([0.1]), np.array([80.0]), 0.01) == pytest.approx(40.0)
    assert stats.area(np.array([0.1, 0.01]), np.array([80.0, 20.0]), 0.01) == pytest.approx(50.0)
    # a worse score at a greater share does not take back what fitted before
    assert stats.area(np.array([0.1, 0.01]), np.array([20.0, 60.0]), 0.01) == pytest.approx(60.0)


def test_the_front_holds_what_no_other_point_beats():
    share, score = np.array([0.1, 0.2, 0.3, 0.3, 0.1]), np.array([5.0, 4.0, 9.0, 8.0, 5.0])
    assert stats.pareto(share, score).tolist() == [True, False, True, False, True]
    # where lower is better, the two cheapest points are beaten in score by the second only
    assert stats.pareto(share, score, higher=False).tolist() == [True, True, False, False, True]
