"""Two methods or two folders, sample by sample."""

import pytest

from analysis import compare
from analysis.load import load_results
from tests.analysis.conftest import Book


def test_two_methods_are_compared_at_the_same_budget(book, capsys):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [1, 1, 1, 1, 1, 1, 1, 0], 0.5)
    book.cell("snapkv", [0, 0, 0, 0, 0, 0, 0, 1], 0.5)
    book.cell("snapkv", [1] * 8, 0.25)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root), "--markdown"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "| 0.5 |" in line and "| 87.50 | 12.50 | -75.00 [" in line and "| 7/1 | tie |" in line  # p is 0.07


def test_two_folders_are_compared_cell_by_cell(book, tmp_path, capsys):
    a, b = Book(tmp_path / "a"), Book(tmp_path / "b")
    for side, scores in ((a, [0.0] * 8), (b, [1.0] * 8)):
        side.cell(scores=[1.0] * 8)
        side.cell("nacl", scores, 0.5)
    a.cell("h2o", [1.0], 0.5)
    assert compare.main([str(a.root), str(b.root), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "+100.00 [+100.00, +100.00] | 0/8 | B is better" in out and "h2o" not in out
    assert "+0.00 [+0.00, +0.00] | 0/0 | tie" in out  # the full cache with itself


def test_only_samples_that_both_have_count(book, capsys):
    book.cell("nacl", [1.0, None, 1.0], 0.5)
    book.cell("snapkv", [1.0, 1.0, None], 0.5)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root), "--markdown"]) == 0
    assert "| 1 | 100.00 | 100.00 |" in capsys.readouterr().out


def test_p_values_are_corrected_for_as_many_comparisons(book):
    for budget in (0.5, 0.25):
        book.cell("nacl", [1.0] * 8, budget)
        book.cell("snapkv", [0.0] * 5 + [1.0] * 3, budget)
    one = load_results(book.root)
    found, _ = compare.pair_cells(one, one, ("nacl", "snapkv"))
    single = [float(compare.comparison([pair])["p (Holm)"].iloc[0]) for pair in found]
    both = [float(p) for p in compare.comparison(found)["p (Holm)"]]
    assert single == pytest.approx([2 / 32] * 2, abs=0.0006)  # printed to three places
    assert both == pytest.approx([4 / 32] * 2, abs=0.0006)


def test_no_side_is_better_where_p_is_no_sign_of_it_however_narrow_the_interval(book):
    book.cell("nacl", [1.0], 0.5)
    book.cell("snapkv", [0.0], 0.5)
    one = load_results(book.root)
    row = compare.comparison(compare.pair_cells(one, one, ("nacl", "snapkv"))[0]).iloc[0]
    assert float(row["p (Holm)"]) == 1.0 and row["verdict"] == "tie"
    assert row["B - A"] == "-100.00 [-]"  # a single sample has no interval


def test_a_table_is_as_wide_as_the_screen(book, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    book.cell("nacl", [1.0] * 8, 0.5)
    book.cell("snapkv", [0.0] * 8, 0.5)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "-100.00 [-100.00, -100.00]" in out and "A is better" in out


def test_an_unknown_name_lists_what_there_is(book, capsys):
    book.cell("nacl", [1.0], 0.5)
    assert compare.main(["nacl", "snapvk", "--results", str(book.root)]) == 2
    assert "snapvk: neither a folder nor a method" in capsys.readouterr().err


def test_a_curve_has_one_name_on_both_sides_whatever_else_one_of_them_holds(tmp_path, capsys):
    a, b = Book(tmp_path / "a"), Book(tmp_path / "b")
    for side in (a, b):
        side.cell("snapkv", [1.0, 0.0], 0.5, config={"kernel": 7})
    a.cell("snapkv", [1.0, 1.0], 0.5, config={"kernel": 1})
    assert compare.main([str(a.root), str(b.root), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| snapkv kernel=7 | 2 | 50.00 | 50.00 |" in out and "kernel=1" not in out


def test_other_data_under_the_same_name_are_not_compared_and_other_weights_are_named(tmp_path, capsys):
    a, b = Book(tmp_path / "a"), Book(tmp_path / "b")
    a.cell("nacl", [1.0], 0.5, fingerprint={"data": 1})
    b.cell("nacl", [1.0], 0.5, fingerprint={"data": 2}, weights="sha256:1")
    assert compare.main([str(a.root), str(b.root), "--markdown"]) == 2
    assert "the task's samples or scores are not the same" in capsys.readouterr().err
    a.cell("nacl", [1.0], 0.5, task="other-mini")
    b.cell("nacl", [0.0], 0.5, task="other-mini", weights="sha256:1")
    assert compare.main([str(a.root), str(b.root), "--markdown"]) == 0
    assert "other-mini, nacl at budget 0.5: the model's weights differ" in capsys.readouterr().err


def test_where_lower_is_better_the_lower_side_is_better_and_longer_texts_weigh_more(book, capsys):
    metric = {"name": "nll", "unit": "nats", "better": "lower", "scale": 1, "digits": 3}
    tokens = [{"weights": {"": n}} for n in (100, 300)]
    book.cell("nacl", [2.0, 2.0], 0.5, metric=metric, rows=tokens)
    book.cell("snapkv", [3.0, 4.0], 0.5, metric=metric, rows=tokens)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root), "--markdown"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "| 2.000 | 3.750 | +1.750 [" in line and "|  | tie |" in line  # of two samples


def test_samples_are_compared_where_both_sides_chose_them_and_hold_the_same(tmp_path, capsys):
    a, b = Book(tmp_path / "a"), Book(tmp_path / "b")
    keys = [{"key": str(i)} for i in range(4)]
    a.cell("nacl", [1.0, 0.0, 1.0], 0.5, rows=keys[:3], began="2026-01-01T00:00:00Z")
    b.cell(
        "nacl", [1.0, 1.0, 0.0, 0.0], 0.5, rows=[*keys[:2], {"key": "mended"}, keys[3]], began="2026-01-01T00:00:00Z"
    )
    (pair,), problems = compare.pair_cells(load_results(a.root), load_results(b.root))
    assert pair.samples["a"].tolist() == [1.0, 0.0] and pair.samples["b"].tolist() == [1.0, 1.0]
    assert "1 samples left out, their contents are not the same on both sides" in problems[0]
