"""Ranks per budget."""

from analysis import leaderboard
from analysis.load import load


def fill(book):
    for task in ("one-mini", "two-mini"):
        book.cell(scores=[1.0] * 20, task=task)
        book.cell("nacl", [1.0] * 20, 0.5, task=task)
        book.cell("snapkv", [1.0] * 19 + [0.0], 0.5, task=task)
        book.cell("random", [0.0] * 19 + [1.0], 0.5, task=task)
    book.cell("h2o", [1.0] * 20, 0.5, task="one-mini")


def test_methods_that_are_no_more_than_noise_apart_share_a_rank(book):
    fill(book)
    ranks = leaderboard.ranking(load(book.root), "tiny", "aware", 0.5).set_index("method")
    assert ranks["rank"].to_dict() == {"nacl": 1, "snapkv": 1, "random": 3}
    assert ranks.loc["snapkv", "retained"] == "95.0%" and ranks.loc["random", "retained"] == "5.0%"


def test_a_method_that_lacks_a_task_is_not_ranked(book):
    fill(book)
    assert "h2o" not in set(leaderboard.ranking(load(book.root), "tiny", "aware", 0.5)["method"])


def test_the_command_prints_a_table_per_budget(book, capsys):
    fill(book)
    assert leaderboard.main([str(book.root)]) == 0
    assert "tiny, aware, budget 0.5" in capsys.readouterr().out
    assert leaderboard.main([str(book.root / "nowhere")]) == 2
