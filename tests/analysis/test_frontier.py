"""Points, fronts, figures and tables, from records on disk."""

import csv

import pytest

from analysis import frontier
from analysis.load import load
from analysis.points import WHOLE, on_front, points

SUBSETS = [("qa", "QA")] * 4 + [("sum", "summaries")] * 4


def fill(book):
    book.cell(scores=[1.0] * 8, subsets=SUBSETS)
    book.cell("nacl", [1, 1, 0, 0, 1, 1, 1, 1], 0.5, subsets=SUBSETS)
    book.cell("nacl", [0, 0, 0, 0, 0, 1, 1, 1], 0.25, subsets=SUBSETS)
    book.cell("random", [0, 0, 0, 0, 0, 0, 0, 1], 0.5, subsets=SUBSETS)
    book.cell("fake", [1] * 8, 0.5, share=0.01, subsets=SUBSETS, notes={"simulated": True})


def test_a_point_is_the_mean_of_category_means_with_its_paired_difference(book):
    fill(book)
    table = points(load(book.root))
    p = table[(table["label"] == "nacl") & (table["budget"] == 0.5) & (table["category"] == WHOLE)].iloc[0]
    assert (p["score"], p["full"], p["difference"], p["n"]) == (75.0, 100.0, -25.0, 8)
    assert p["difference_low"] < -25 < p["difference_high"] <= 0 and p["retained"] == pytest.approx(0.75)
    assert (p["worst"], p["worst_difference"], p["lost"], p["won"]) == ("qa", -50.0, 2, 0)
    by_category = table[(table["label"] == "nacl") & (table["budget"] == 0.5)].set_index("category")["score"]
    assert by_category["QA"] == 50.0 and by_category["summaries"] == 100.0


def test_simulated_savings_are_on_no_front(book):
    fill(book)
    table = points(load(book.root))
    front = table[on_front(table) & (table["category"] == WHOLE)]
    assert set(zip(front["label"], front["budget"])) == {("full", 1.0), ("nacl", 0.5), ("nacl", 0.25)}


def test_seeds_are_pooled_and_settings_are_curves_of_their_own(book):
    book.cell(scores=[1.0, 1.0])
    for seed, scores in ((0, [1.0, 0.0]), (1, [0.0, 0.0])):
        book.cell("random", scores, 0.5, seed=seed)
    book.cell("snapkv", [1.0, 1.0], 0.5, config={"kernel": 7})
    book.cell("snapkv", [1.0, 0.0], 0.5, config={"kernel": 1})
    table = points(load(book.root)).set_index("label")
    assert table.loc["random", "score"] == 25.0 and table.loc["random", "seeds"] == 2
    assert table.loc["snapkv kernel=1", "score"] == 50.0 and table.loc["snapkv kernel=7", "score"] == 100.0


def test_where_lower_is_better_a_higher_value_is_a_loss(book):
    metric = {"name": "nll", "unit": "nats", "better": "lower", "scale": 1, "digits": 3}
    book.cell(scores=[2.0, 2.0], metric=metric)
    book.cell("nacl", [2.5, 2.5], 0.5, metric=metric)
    p = points(load(book.root)).set_index("label").loc["nacl"]
    assert p["score"] == 2.5 and p["difference"] == pytest.approx(-0.5) and not p["tie"]


def test_a_task_that_the_full_cache_cannot_do_is_listed_apart(book):
    book.cell(scores=[0.0] * 30)
    book.cell("nacl", [0.0] * 30, 0.5)
    table = points(load(book.root))
    assert table["near_chance"].all()
    assert "near chance" in frontier.summary(table)["note"].str.cat()
    assert frontier.areas(table).empty


def test_cells_without_a_full_cache_beside_them_are_named(book):
    book.cell(scores=[1.0])
    book.cell("nacl", [1.0], 0.5, task="other-mini")
    results = load(book.root)
    assert set(points(results)["task"]) == {"quiz-mini"}
    assert any("other-mini" in p and "no full cache" in p for p in results.problems)


def test_a_difference_inside_its_interval_is_printed_as_a_tie(book):
    book.cell(scores=[1.0, 0.0] * 10)
    book.cell("nacl", [0.0, 1.0] * 10, 0.5)
    line = frontier.summary(points(load(book.root))).set_index("method").loc["nacl"]
    assert line["difference"].endswith("tie") and line["lost/won"] == "10/10"


def test_the_command_writes_pictures_and_tables(book, tmp_path, capsys):
    fill(book)
    out = tmp_path / "figures"
    assert frontier.main([str(book.root), "--out", str(out)]) == 0
    assert (out / "frontier.png").stat().st_size > 10_000
    assert "<svg" in (out / "frontier.svg").read_text() and "longtable" not in (out / "frontier.tex").read_text()
    with (out / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["label"] for r in rows} == {"full", "nacl", "random", "fake"}
    assert "| quiz-mini | aware | nacl |" in (out / "frontier.md").read_text()
    assert "5 points of 1 tasks" in capsys.readouterr().out


def test_a_wrong_name_lists_the_right_ones(book, capsys):
    fill(book)
    assert frontier.main([str(book.root), "--task", "qiuz"]) == 2
    assert "quiz-mini" in capsys.readouterr().err
    assert frontier.main([str(book.root / "nowhere")]) == 2


def test_a_task_may_average_its_subsets_whatever_their_categories(book):
    subsets = [("a", "x"), ("b", "x"), ("c", "y")]
    for mean_over, score in (("categories", 75.0), ("subsets", 200 / 3)):
        notes = {"mean_over": mean_over}
        book.cell(scores=[1.0, 0.0, 1.0], subsets=subsets, task=f"{mean_over}-mini", notes=notes)
        table = points(load(book.root))
        assert table[table["task"] == f"{mean_over}-mini"]["score"].iloc[0] == pytest.approx(score)
