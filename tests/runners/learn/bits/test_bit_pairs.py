"""Which pairs of bits a layer may choose from, and which layers choose together."""

import pytest

from methods.kvtuner import Pair
from runners.learn.bits.bit_pairs import Group, group_layers, pareto_pairs

ORDER = [Pair(k, v) for k in (8, 4, 2) for v in (8, 4, 2)]
# relative output errors of Llama-3.1-8B, per-token mode: the paper's Table 3
TABLE_3 = dict(zip(ORDER, [0.014, 0.100, 0.401, 0.168, 0.207, 0.453, 0.882, 0.892, 0.962]))


def names(pairs) -> list[str]:
    return [str(pair) for pair in pairs]


def test_the_published_errors_leave_the_published_pairs():
    assert names(pareto_pairs(TABLE_3)) == ["KV8", "K8V4", "KV4", "K4V2", "KV2"]


def test_a_layer_whose_values_matter_more_than_its_keys_keeps_another_set():
    # the first layer of Llama-3.1-8B in the paper's Table 4: cheap keys, dear values
    errors = dict(zip(ORDER, [0.01, 0.30, 0.70, 0.02, 0.10, 0.60, 0.63, 0.65, 0.80]))
    assert names(pareto_pairs(errors)) == ["KV8", "K4V8", "KV4", "K4V2", "KV2"]


def test_a_pair_with_more_bits_and_no_less_error_is_never_tried():
    flat = dict.fromkeys(ORDER, 0.5)
    assert names(pareto_pairs(flat)) == ["KV2"]


def test_of_two_equal_pairs_the_one_with_more_key_bits_stays():
    errors = {Pair(8, 4): 0.1, Pair(4, 8): 0.1, Pair(2, 2): 0.9}
    assert names(pareto_pairs(errors)) == ["K8V4", "KV2"]


def scaled(factor: float, swap: bool = False) -> dict[Pair, float]:
    """TABLE_3 with all errors multiplied; swap: keys and values exchanged."""
    return {Pair(p.value, p.key) if swap else p: error * factor for p, error in TABLE_3.items()}


def test_layers_with_the_same_pairs_and_close_errors_are_one_group():
    profile = [scaled(1), scaled(0.5), scaled(1.01), scaled(0.51), scaled(1, swap=True), scaled(1.02)]
    assert [group.layers for group in group_layers(profile)] == [(0, 2, 5), (1, 3), (4,)]


def test_layers_of_different_pairs_never_share_a_group_however_close_they_are():
    near = {**TABLE_3, Pair(4, 8): 0.099}  # K4V8 now beats K8V4 by a hair
    first, second = group_layers([TABLE_3, near])
    assert names(first.pairs)[1] == "K8V4" and names(second.pairs)[1] == "K4V8"


@pytest.mark.parametrize(("outliers", "expected"), [("together", [(0, 1), (2, 3)]), ("apart", [(0, 1), (2,), (3,)])])
def test_layers_that_are_near_nobody_are_one_group_or_one_each(outliers, expected):
    profile = [scaled(1), scaled(1), scaled(3), scaled(9)]
    assert [group.layers for group in group_layers(profile, outliers=outliers)] == expected


def test_layers_within_a_twentieth_are_one_group():
    profile = [{Pair(8, 8): 0.1, Pair(2, 2): error} for error in (0.5, 0.54, 0.61)]
    assert [group.layers for group in group_layers(profile)] == [(0, 1), (2,)]
    assert [group.layers for group in group_layers(profile, eps=0.08)] == [(0, 1, 2)]


def test_chains_of_near_layers_are_one_group_and_a_wider_radius_joins_more():
    profile = [scaled(1), scaled(1.03), scaled(1.06), scaled(1.3)]  # 0.05 apart: 1.03 is 0.052 away in all errors
    assert len(group_layers(profile, eps=0.06)) == 2
    assert len(group_layers(profile, eps=0.6)) == 1
    assert group_layers(profile, eps=0.6)[0] == Group((0, 1, 2, 3), pareto_pairs(TABLE_3))
