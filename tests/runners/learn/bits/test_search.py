"""The search over groups of layers, with scores whose best tables are known."""

from itertools import product

import pytest

from methods.kvtuner import Pair, nominal_bits
from runners.learn.bits.bit_pairs import Group
from runners.learn.bits.search import SAMPLERS, Trial, best_under, front, population_of, search_tables, tables

PAIRS = (Pair(8, 8), Pair(8, 4), Pair(4, 4), Pair(4, 2), Pair(2, 2))
FEW = [Group((0, 3), PAIRS), Group((1,), PAIRS), Group((2,), PAIRS[2:])]  # 75 tables
MANY = [Group((0, 3), PAIRS), Group((1,), PAIRS), Group((2,), PAIRS), Group((4,), PAIRS)]  # 625 tables
LOSS = {Pair(8, 8): 0.0, Pair(8, 4): 0.1, Pair(4, 4): 0.3, Pair(4, 2): 1.0, Pair(2, 2): 3.0}
WEIGHT = (1.0, 0.2, 5.0, 1.0, 2.0)  # how much each layer's loss counts


def score_of(table) -> float:
    return -sum(weight * LOSS[pair] for weight, pair in zip(WEIGHT, table))


def score(several) -> list[float]:
    return [score_of(table) for table in several]


def every(groups) -> list[Trial]:
    """All tables of the groups."""
    choices = product(*(range(len(group.pairs)) for group in groups))
    return [Trial(table, nominal_bits(table), score_of(table)) for table in (tables(groups, c) for c in choices)]


def points(trials) -> set[tuple[float, float]]:
    return {(trial.bits, round(trial.score, 6)) for trial in trials}


def test_every_layer_of_a_group_gets_the_groups_pair():
    assert [str(pair) for pair in tables(FEW, [1, 4, 0])] == ["K8V4", "KV2", "KV4", "K8V4"]


def test_bits_weigh_layers_and_not_groups():
    assert nominal_bits(tables(FEW, [0, 4, 0])) == (8 + 2 + 4 + 8) / 4


def test_the_front_holds_what_nothing_beats_and_nothing_else():
    tried = every(FEW)
    found = front(tried)
    assert [trial.bits for trial in found] == sorted({trial.bits for trial in found})

    def beaten(trial):
        return any(
            other.bits <= trial.bits and other.score >= trial.score and points([other]) != points([trial])
            for other in tried
        )

    assert not any(beaten(trial) for trial in found)
    assert all(beaten(trial) for trial in tried if points([trial]) - points(found))


def test_where_trials_suffice_every_table_is_tried_once():
    tried = search_tables(FEW, score, limit=4, trials=200)
    assert len(tried) == len({trial.table for trial in tried}) == 75
    assert points(front(tried)) == points(front(every(FEW)))


def test_tables_are_scored_together_and_none_is_lost():
    sizes = []

    def counting(several):
        sizes.append(len(several))
        return score(several)

    assert len(search_tables(MANY, counting, limit=4, trials=140, at_once=16)) == 140
    assert sizes == [16] * 8 + [12]
    assert points(search_tables(FEW, counting, limit=4, trials=75, at_once=16)) == points(every(FEW))


def test_a_search_of_a_larger_space_comes_close_to_the_known_front():
    tried = search_tables(MANY, score, limit=8, trials=600)
    known = points(front(every(MANY)))
    assert len({trial.table for trial in tried}) < 400  # it was searched, not tried whole
    assert len(points(front(tried)) & known) >= 0.7 * len(known)


@pytest.mark.parametrize("limit", [4, 6])
def test_the_best_table_under_a_limit_comes_close_to_the_known_one(limit):
    best = best_under(search_tables(MANY, score, limit=limit, trials=200), limit)
    within = sorted((t.score for t in every(MANY) if t.bits <= limit), reverse=True)
    assert best is not None and best.bits <= limit
    assert best.score >= within[len(within) // 50]


def test_a_limit_draws_the_search_towards_fewer_bits():
    tight, loose = (search_tables(MANY, score, limit=limit, trials=200) for limit in (3, 8))

    def share(tried):
        return sum(trial.bits <= 3 for trial in tried[100:]) / 100

    assert share(tight) > 2 * share(loose)


def test_few_trials_are_several_generations_and_not_one_of_random_draws():
    assert population_of(25) * 5 <= 25 and population_of(200) * 8 <= 200 and population_of(100_000) == 50

    def within(seed):
        # all in one go, as long as that asks for no more than a generation at once
        return [trial.bits <= 3 for trial in search_tables(MANY, score, limit=3, trials=48, seed=seed, at_once=48)]

    shares = [within(seed) for seed in range(8)]
    first, last = (sum(sum(own[part]) for own in shares) / 8 / 16 for part in (slice(16), slice(32, 48)))
    assert last > first + 0.2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_seed_one_search(sampler):
    runs = [search_tables(MANY, score, limit=4, trials=30, sampler=sampler, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_ties_in_score_go_to_fewer_bits_and_no_table_within_the_limit_is_none():
    tried = [Trial((Pair(8, 8),), 8.0, 1.0), Trial((Pair(4, 4),), 4.0, 1.0), Trial((Pair(2, 2),), 2.0, 0.5)]
    assert best_under(tried, 8) == tried[1]
    assert best_under(tried, 1) is None
    assert front(tried) == [tried[2], tried[1]]
