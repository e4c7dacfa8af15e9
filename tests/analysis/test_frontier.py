"""Points, fronts, figures and tables, from records on disk."""

import csv

import numpy as np
import pytest

from analysis import frontier, stats, style
from analysis.area import areas
from analysis.load import NothingToRead, load_results
from analysis.paired import WHOLE
from analysis.points import on_front, points

SUBSETS = [("qa", "QA")] * 4 + [("sum", "summaries")] * 4


def fill(book):
    book.cell(scores=[1.0] * 8, subsets=SUBSETS)
    book.cell("nacl", [1, 1, 0, 0, 1, 1, 1, 1], 0.5, subsets=SUBSETS)
    book.cell("nacl", [0, 0, 0, 0, 0, 1, 1, 1], 0.25, subsets=SUBSETS)
    book.cell("random", [0, 0, 0, 0, 0, 0, 0, 1], 0.5, subsets=SUBSETS)
    book.cell("fake", [1] * 8, 0.5, share=0.01, subsets=SUBSETS, notes={"simulated": True})


def test_a_point_is_the_mean_of_category_means_with_its_paired_difference(book):
    fill(book)
    table = points(load_results(book.root))
    p = table[(table["label"] == "nacl") & (table["budget"] == 0.5) & (table["category"] == WHOLE)].iloc[0]
    assert (p["score"], p["full"], p["difference"], p["n"]) == (75.0, 100.0, -25.0, 8)
    assert p["difference_low"] < -25 < p["difference_high"] <= 0 and p["retained"] == pytest.approx(0.75)
    assert (p["worst"], p["worst_difference"], p["lost"], p["won"]) == ("qa", -50.0, 2, 0)
    by_category = table[(table["label"] == "nacl") & (table["budget"] == 0.5)].set_index("category")["score"]
    assert by_category["QA"] == 50.0 and by_category["summaries"] == 100.0


def test_simulated_savings_are_on_no_front(book):
    fill(book)
    table = points(load_results(book.root))
    front = table[on_front(table) & (table["category"] == WHOLE)]
    assert set(zip(front["label"], front["budget"])) == {("full", 1.0), ("nacl", 0.5), ("nacl", 0.25)}


def test_seeds_are_pooled_and_settings_are_curves_of_their_own(book):
    book.cell(scores=[1.0, 1.0])
    for seed, scores in ((0, [1.0, 0.0]), (1, [0.0, 0.0])):
        book.cell("random", scores, 0.5, seed=seed)
    book.cell("snapkv", [1.0, 1.0], 0.5, config={"kernel": 7})
    book.cell("snapkv", [1.0, 0.0], 0.5, config={"kernel": 1})
    table = points(load_results(book.root)).set_index("label")
    assert table.loc["random", "score"] == 25.0 and table.loc["random", "seeds"] == 2
    assert table.loc["snapkv kernel=1", "score"] == 50.0 and table.loc["snapkv kernel=7", "score"] == 100.0


def test_only_samples_that_all_seeds_have_are_pooled_and_any_seed_of_the_full_cache_will_do(book):
    book.cell(scores=[1.0, None, 1.0], seed=0)
    book.cell(scores=[None, 0.0, 1.0], seed=1)
    book.cell("random", [1.0, 1.0, None], 0.5, seed=0)
    book.cell("random", [0.0, 1.0, 1.0], 0.5, seed=1)
    p = points(load_results(book.root)).set_index("label").loc["random"]
    assert (p["n"], p["score"], p["full"]) == (2, 75.0, 50.0)


def test_where_lower_is_better_a_higher_value_is_a_loss(book):
    metric = {"name": "nll", "unit": "nats", "better": "lower", "scale": 1, "digits": 3}
    book.cell(scores=[2.0] * 8, metric=metric)
    book.cell("nacl", [2.5] * 8, 0.5, metric=metric)
    p = points(load_results(book.root)).set_index("label").loc["nacl"]
    assert p["score"] == 2.5 and p["difference"] == pytest.approx(0.5) and not p["tie"]
    assert not p["near_chance"] and (p["lost"], p["won"]) == (0, 0) and np.isnan(p["retained"])


def test_a_single_sample_has_no_interval_as_on_screen(book):
    book.cell(scores=[1.0])
    book.cell("nacl", [0.0], 0.5)
    table = points(load_results(book.root))
    p = table.set_index("label").loc["nacl"]
    ends = [f"{what}_{end}" for what in ("score", "full", "difference", "retained") for end in ("low", "high")]
    assert p[ends].isna().all() and p["difference"] == -100.0 and p["tie"]
    (line,) = [row for _, row in frontier.summary(table).iterrows() if row["method"] == "nacl"]
    assert line["difference"] == "-100.00 [-] tie"
    under = areas(load_results(book.root), table)
    assert under[["area_low", "area_high"]].isna().all(axis=None) and under["area"].tolist() == [0.0]
    assert "| 0.00 | - |" in frontier.page(table, under)


def test_a_task_that_the_full_cache_cannot_do_is_listed_apart(book):
    book.cell(scores=[0.0] * 30)
    book.cell("nacl", [0.0] * 30, 0.5)
    table = points(load_results(book.root))
    assert table["near_chance"].all()
    assert "near chance" in frontier.summary(table)["note"].str.cat()
    assert areas(load_results(book.root), table).empty
    text = frontier.page(table, areas(load_results(book.root), table))
    assert text.startswith("Near chance with the full cache") and "| nacl | 0.5 |" in text
    with pytest.raises(NothingToRead, match="above chance"):
        frontier.draw_frontier(table, "held")


def test_cells_without_a_full_cache_beside_them_are_named(book):
    book.cell(scores=[1.0])
    book.cell("nacl", [1.0], 0.5, task="other-mini")
    results = load_results(book.root)
    assert set(points(results)["task"]) == {"quiz-mini"}
    assert any("other-mini" in p and "no full cache" in p for p in results.problems)


def test_a_difference_inside_its_interval_is_printed_as_a_tie(book):
    book.cell(scores=[1.0, 0.0] * 10)
    book.cell("nacl", [0.0, 1.0] * 10, 0.5)
    line = frontier.summary(points(load_results(book.root))).set_index("method").loc["nacl"]
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
    best = [(r["label"], r["budget"]) for r in rows if r["category"] == "QA" and r["front"] == "True"]
    # a category has a front of its own; at 0.25 nothing of QA is left
    assert best == [("full", "1.0"), ("nacl", "0.5")]
    family = [(r["label"], r["budget"]) for r in rows if r["category"] == "all" and r["family_front"] == "True"]
    assert ("random", "0.5") not in family and ("full", "1.0") in family
    text = (out / "frontier.md").read_text()
    assert "| quiz-mini | aware | nacl |" in text and "Area under the frontier" in text and "Near chance" not in text
    again = tmp_path / "again"
    assert frontier.main([str(book.root), "--out", str(again)]) == 0
    for kind in ("png", "svg", "pdf", "csv", "md", "tex"):
        assert (again / f"frontier.{kind}").read_bytes() == (out / f"frontier.{kind}").read_bytes()
    assert "5 points of 1 tasks" in capsys.readouterr().out


@pytest.mark.parametrize(("x", "head"), [("held", "bytes held"), ("read", "bytes read"), ("peak", "peak bytes")])
def test_the_table_says_of_whose_bytes_its_shares_are(book, x, head, monkeypatch):
    monkeypatch.setattr(frontier, "draw_frontier", lambda *given: None)
    monkeypatch.setattr(frontier.style, "save", lambda *given: None)
    fill(book)
    assert frontier.main([str(book.root), "--x", x]) == 0
    text = (book.root / "frontier.md").read_text()
    assert [word for word in frontier.HEADS.values() if f"| {word} |" in text] == [head]


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
        table = points(load_results(book.root))
        assert table[table["task"] == f"{mean_over}-mini"]["score"].iloc[0] == pytest.approx(score)


def test_texts_of_unequal_length_weigh_by_their_tokens(book):
    metric = {"name": "nll", "unit": "nats", "better": "lower", "scale": 1, "digits": 3}
    tokens = [{"weights": {"": n}} for n in (100, 300)]
    book.cell(scores=[2.0, 2.0], metric=metric, rows=tokens)
    book.cell("nacl", [2.0, 3.0], 0.5, metric=metric, rows=tokens)
    table = points(load_results(book.root)).set_index("label")
    assert table.loc["nacl", "score"] == pytest.approx(2.75)
    assert table.loc["nacl", "difference"] == pytest.approx(0.75)


def test_different_measures_are_not_averaged_but_have_a_task_each(book):
    subsets = [("a", "a")] * 4 + [("b", "b")] * 4
    rows = [{"parts": {"acc": 1.0}}] * 4 + [{"parts": {"perplexity": 9.0}}] * 4
    book.cell(scores=[1.0] * 4 + [9.0] * 4, subsets=subsets, rows=rows)
    book.cell("nacl", [0.5] * 4 + [7.0] * 4, 0.5, subsets=subsets, rows=rows)
    table = points(load_results(book.root)).set_index(["task", "label"])
    assert table.loc[("quiz-mini, acc", "nacl"), "score"] == 50
    assert table.loc[("quiz-mini, perplexity", "nacl"), "score"] == 700
    assert len(table) == 4


def test_control_samples_have_a_category_and_count_in_no_average(book):
    rows = [{}] * 4 + [{"tags": {"control": True}}] * 4
    subsets = [("a", "a")] * 4 + [("no_needle", "no_needle")] * 4
    book.cell(scores=[1.0] * 8, subsets=subsets, rows=rows)
    book.cell("nacl", [1.0] * 4 + [0.0] * 4, 0.5, subsets=subsets, rows=rows)
    table = points(load_results(book.root))
    table = table[table["label"] == "nacl"].set_index("category")
    assert table["score"].to_dict() == {WHOLE: 100.0, "a": 100.0, "no_needle": 0.0}
    assert table["n"].to_dict() == {WHOLE: 4, "a": 4, "no_needle": 4} and table.loc[WHOLE, "lost"] == 0


def test_a_task_of_choices_is_near_chance_where_guessing_would_do_as_well(book):
    rows = [{"tags": {"gold": 0, "n": 2}}] * 40
    for task, right in (("coin-mini", 22), ("known-mini", 36)):
        book.cell(scores=[1.0] * right + [0.0] * (40 - right), task=task, rows=rows)
        book.cell("nacl", [1.0] * 20 + [0.0] * 20, 0.5, task=task, rows=rows)
    table = points(load_results(book.root))
    assert table.groupby("task")["near_chance"].all().to_dict() == {"coin-mini": True, "known-mini": False}


def test_a_method_that_stopped_early_is_on_no_front_and_under_no_area(book):
    book.cell(scores=[1.0] * 20)
    book.cell("nacl", [1.0] * 20, 0.5)
    book.cell("kivi", [1.0] * 3 + [None] * 17, 0.1)
    results = load_results(book.root)
    table = points(results)
    assert table.set_index("label")["partial"].to_dict() == {"full": False, "kivi": True, "nacl": False}
    assert set(table[on_front(table)]["label"]) == {"nacl"}
    assert areas(results, table)["method"].tolist() == ["nacl"]
    assert "partial" in frontier.summary(table).set_index("method").loc["kivi", "note"]


def test_holms_correction_counts_the_methods_and_not_the_full_cache(book):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [0.0] * 5 + [1.0] * 3, 0.5)
    book.cell("h2o", [1.0] * 8, 0.5)
    table = points(load_results(book.root)).set_index("label")
    assert table.loc["nacl", "p_holm"] == pytest.approx(2 * table.loc["nacl", "p"])
    assert table.loc["nacl", "p"] == pytest.approx(2 / 32, abs=0.02) and table["p_holm"].isna()["full"]


def test_the_area_has_the_interval_of_its_bootstrap(book):
    fill(book)
    results = load_results(book.root)
    made = areas(results, points(results)).set_index("method")
    nacl = made.loc["nacl"]
    # nothing fits below 0.25; to 0.5 the score is 37.5, then 75; the smallest real share is nacl's own
    assert nacl["from"] == 0.25 and nacl["area"] == pytest.approx((37.5 + 75.0) / 2)
    assert nacl["area_low"] < nacl["area"] < nacl["area_high"] and "fake" not in made.index
    scores = {"QA/qa": [(1, 0), (1, 0), (0, 0), (0, 0)], "summaries/sum": [(1, 0), (1, 1), (1, 1), (1, 1)]}
    qa, summaries = (
        stats.bootstrap(np.array(own, dtype=float), np.ones(4), list("abcd"), key)[1:] for key, own in scores.items()
    )
    at_half, at_quarter = (50 * (qa[:, i] + summaries[:, i]) for i in (0, 1))
    expected = np.percentile((np.maximum(at_half, at_quarter) + at_quarter) / 2, [2.5, 97.5])
    assert (nacl["area_low"], nacl["area_high"]) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("share", [1.0, 1.25])
def test_there_is_no_area_where_nothing_is_smaller_than_the_full_cache(book, share):
    book.cell(scores=[1.0] * 4)
    book.cell("nacl", [0.0] + [1.0] * 3, share=share)
    book.cell("kivi", [1.0] * 4, share=share)
    results = load_results(book.root)
    table = points(results)
    assert len(table) == 3 and areas(results, table).empty
    assert "Area under the frontier" not in frontier.page(table, areas(results, table))


def test_an_area_is_over_the_samples_that_all_its_points_have(book):
    book.cell(scores=[1.0] * 20)
    book.cell("nacl", [0.0] + [1.0] * 19, 0.5)
    book.cell("nacl", [None] + [1.0] * 10 + [0.0] * 9, 0.25)
    results = load_results(book.root)
    (nacl,) = areas(results, points(results)).to_dict("records")
    # the first sample counts at neither point
    assert nacl["n"] == 19 and nacl["area"] == pytest.approx((100 * 10 / 19 + 100) / 2)


def test_a_cell_of_other_conditions_than_its_full_cache_is_named(book):
    book.cell(scores=[1.0], torch="2.11")
    book.cell("nacl", [1.0], 0.5, torch="2.12")
    results = load_results(book.root)
    assert set(points(results)["label"]) == {"full", "nacl"}
    (said,) = results.problems
    assert "nacl at budget 0.5" in said and "torch is 2.12, was 2.11" in said and "code" not in said


def test_bits_are_places_on_one_curve_and_never_pooled_like_seeds(book):
    book.cell(scores=[1.0] * 4)
    for key, score in ((2, 0.0), (4, 1.0)):
        book.cell("kivi", [score] * 4, 1.0, share=key / 16, config={"key_bits": key, "value_bits": key})
    table = points(load_results(book.root))
    table = table[table["label"] == "kivi"].set_index("bits")
    assert table["score"].to_dict() == {"2 bits": 0.0, "4 bits": 100.0} and set(table["seeds"]) == {1}


def test_no_two_methods_of_a_family_look_alike_and_none_changes_with_what_is_drawn_beside_it():
    families = dict.fromkeys(style.METHODS, "eviction")
    assert len(set(style.looks(families).values())) == len(style.METHODS)
    assert {look.marker for look in style.looks(families).values()} == {"o"}
    assert len({style.look(name, "eviction").colour for name in style.METHODS[:8]}) == 8
    alone = style.looks({"h2o": "eviction", "mine": "other", "snapkv kernel=7": "eviction"})
    beside = style.looks({**families, "mine": "other", "another": "other", "snapkv kernel=7": "eviction"})
    assert {label: beside[label] for label in alone} == alone
    settings = style.look("snapkv kernel=7", "eviction")
    assert settings.colour == alone["snapkv kernel=7"].colour == style.look("snapkv", "eviction").colour
    assert settings != style.look("snapkv", "eviction")
    assert style.line(alone["h2o"], hollow=True)["markerfacecolor"] == "white"


def test_a_picture_draws_hollow_points_on_a_logarithmic_axis_and_panels_per_category(book):
    fill(book)
    table = points(load_results(book.root))
    (axis,) = (a for a in frontier.draw_frontier(table, "held").axes if a.get_visible())
    lines = {tuple(round(x, 3) for x in line.get_xdata()): line for line in axis.lines}
    assert axis.get_xscale() == "log" and lines[(0.01,)].get_markerfacecolor() == "white"
    assert lines[(0.25, 0.5)].get_markerfacecolor() != "white"
    figure = frontier.draw_frontier(table, "held", log=False, categories=True)
    assert figure.get_suptitle() == "tiny"
    assert [a.get_title() for a in figure.axes] == ["quiz-mini (aware): QA", "quiz-mini (aware): summaries"]
    assert figure.axes[0].get_xscale() == "linear"


def test_a_point_with_many_samples_above_the_budget_is_drawn_hollow(book):
    fill(book)
    table = points(load_results(book.root))
    above = table.assign(above=np.where(table["share"].round(3) == 0.5, table["n"], 0))
    (axis,) = (a for a in frontier.draw_frontier(above, "held").axes if a.get_visible())
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    found = {tuple(round(x, 3) for x in line.get_xdata()): line for line in hollow}
    assert (0.5,) in found and found[(0.5,)].get_linestyle() == "None"


def test_a_legend_of_long_names_fits_the_width_of_one_column(book):
    book.cell(scores=[1.0])
    for i in range(6):
        book.cell(f"a_method_with_a_long_name_{i}", [1.0], 0.5)
    figure = frontier.draw_frontier(points(load_results(book.root)), "held", columns=1)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0


def test_what_scores_no_more_than_guessing_or_than_random_slots_is_on_no_front(book):
    book.cell(scores=[1.0] * 40)
    book.cell("snapkv", [1.0] * 1 + [0.0] * 39, 0.02)  # two points above nothing
    book.cell("h2o", [1.0] * 10 + [0.0] * 30, 0.1)
    book.cell("random", [1.0] * 12 + [0.0] * 28, 0.1)
    book.cell("nacl", [1.0] * 30 + [0.0] * 10, 0.2)
    table = points(load_results(book.root))
    assert set(table[on_front(table)]["label"]) == {"random", "nacl", "full"}


def test_a_difference_whose_p_says_nothing_is_a_tie(book):
    book.cell(scores=[1.0] * 3)
    book.cell("nacl", [0.0] * 3, 0.5)
    table = points(load_results(book.root)).set_index("label")
    assert table.loc["nacl", "difference_high"] < 0 and table.loc["nacl", "p_holm"] > 0.05 and table.loc["nacl", "tie"]
