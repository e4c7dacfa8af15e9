"""Ranks per budget."""

import numpy as np

from analysis import leaderboard
from analysis.load import load_results
from analysis.paired import gathered


def fill(book):
    for task in ("one-mini", "two-mini"):
        book.cell(scores=[1.0] * 20, task=task)
        book.cell("nacl", [1.0] * 20, 0.5, task=task)
        book.cell("snapkv", [1.0] * 19 + [0.0], 0.5, task=task)
        book.cell("random", [0.0] * 19 + [1.0], 0.5, task=task)
    book.cell("h2o", [1.0] * 20, 0.5, task="one-mini")


def test_methods_that_are_no_more_than_noise_apart_share_a_rank(book):
    fill(book)
    found = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5)
    ranks, apart = found.rows, found.apart
    ranks = ranks.set_index("method")
    assert ranks["rank"].to_dict() == {"nacl": 1, "snapkv": 1, "random": 3} and not apart
    assert ranks.loc["snapkv", "retained"] == "95.0%" and ranks.loc["random", "retained"] == "5.0%"
    assert ranks.loc["random", "95 % interval"].startswith("0.0% to 1")


def test_a_method_that_lacks_a_task_is_not_ranked_and_is_named(book, capsys):
    fill(book)
    found = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5)
    assert set(found.rows["method"]) == {"nacl", "snapkv", "random"} and set(found.rows["n"]) == {40}
    assert found.lacking == {"h2o": ["two-mini"]}
    assert leaderboard.main([str(book.root)]) == 0
    assert "not ranked: h2o, which has no two-mini" in capsys.readouterr().out


def test_a_single_sample_ranks_nobody_and_has_no_interval(book):
    book.cell(scores=[1.0])
    book.cell("nacl", [1.0], 0.5)
    book.cell("random", [0.0], 0.5)
    (task,) = gathered(load_results(book.root))
    ranks = leaderboard.ranking([task], "tiny", "aware", 0.5).rows.set_index("method")
    assert ranks["rank"].to_dict() == {"nacl": 1, "random": 1} and set(ranks["95 % interval"]) == {"-"}


def test_methods_on_different_tasks_are_not_ranked_together_and_n_counts_no_task_that_none_has(book):
    for task in ("one-mini", "two-mini", "zoo-mini"):
        book.cell(scores=[1.0] * 20, task=task)
    for method, second in (("nacl", "two-mini"), ("h2o", "zoo-mini")):
        book.cell(method, [1.0] * 20, 0.5, task="one-mini")
        book.cell(method, [1.0] * 20, 0.5, task=second)
    found = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5)
    assert list(found.rows["method"]) == ["h2o"] and list(found.rows["n"]) == [40]
    assert found.lacking == {"nacl": ["zoo-mini"]}


def test_the_worst_task_stands_beside_the_mean(book):
    for task, score in (("one-mini", 1.0), ("two-mini", 0.25)):
        book.cell(scores=[1.0] * 4, task=task)
        book.cell("nacl", [score] * 4, 0.5, task=task)
    ranks = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5).rows
    assert ranks[["retained", "worst task", "tasks", "n"]].iloc[0].tolist() == ["62.5%", "two-mini 25.0%", 2, 8]


def test_a_task_near_chance_is_named_and_counts_nowhere(book, capsys):
    fill(book)
    guess = [{"tags": {"gold": 0, "n": 4}}] * 40
    book.cell(scores=[1.0, 0.0, 0.0, 0.0] * 10, task="guess-mini", rows=guess)
    book.cell("nacl", [0.0] * 40, 0.5, task="guess-mini", rows=guess)
    found = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5)
    ranks, apart = found.rows, found.apart
    assert apart == ["guess-mini"] and ranks.set_index("method").loc["nacl", "retained"] == "100.0%"
    assert leaderboard.main([str(book.root)]) == 0
    assert "near chance with the full cache, not counted: guess-mini" in capsys.readouterr().out


def test_losses_are_not_ranked_and_no_score_is_named_near_chance_for_it(book):
    fill(book)
    metric = {"name": "nll", "unit": "nats", "better": "lower", "scale": 1, "digits": 3}
    book.cell(scores=[2.0] * 20, task="text-mini", metric=metric)
    book.cell("nacl", [3.0] * 20, 0.5, task="text-mini", metric=metric)
    found = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5)
    ranks, apart = found.rows, found.apart
    assert set(ranks["tasks"]) == {2} and not apart


def test_methods_are_ranked_on_the_samples_that_all_of_them_have(book):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [1.0] * 4 + [0.0] * 4, 0.5)
    book.cell("snapkv", [None, None, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], 0.5)
    ranks = leaderboard.ranking(list(gathered(load_results(book.root))), "tiny", "aware", 0.5).rows
    assert ranks.set_index("method")["retained"].to_dict() == {"snapkv": "66.7%", "nacl": "33.3%"}
    assert set(ranks["n"]) == {6}


def test_being_behind_survives_holms_correction_for_many_methods(book):
    best = np.concatenate([[1.0], np.full(2000, 1.0)])
    worse = np.concatenate([[0.9], np.where(np.arange(2000) < 20, 1.0, 0.9)])  # p = 2 * 21 / 2001
    assert leaderboard._behind([best, worse]) == [False, True]
    assert leaderboard._behind([best, worse, worse, worse]) == [False, False, False, False]


def test_the_command_prints_a_table_per_budget(book, capsys):
    fill(book)
    assert leaderboard.main([str(book.root)]) == 0
    assert "tiny, aware, budget 0.5" in capsys.readouterr().out
    assert leaderboard.main([str(book.root / "nowhere")]) == 2
