"""Two methods or two folders, sample by sample."""

from analysis import compare


def test_two_methods_are_compared_at_the_same_budget(book, capsys):
    book.cell(scores=[1.0] * 8)
    book.cell("nacl", [1, 1, 1, 1, 1, 1, 1, 0], 0.5)
    book.cell("snapkv", [0, 0, 0, 0, 0, 0, 0, 1], 0.5)
    book.cell("snapkv", [1] * 8, 0.25)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root)]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "| 0.5 |" in line and "| 87.50 | 12.50 | -75.00 [" in line and "| 7/1 | A is better |" in line


def test_two_folders_are_compared_cell_by_cell(book, tmp_path, capsys):
    from tests.analysis.conftest import Book

    a, b = Book(tmp_path / "a"), Book(tmp_path / "b")
    for side, scores in ((a, [0.0] * 8), (b, [1.0] * 8)):
        side.cell(scores=[1.0] * 8)
        side.cell("nacl", scores, 0.5)
    a.cell("h2o", [1.0], 0.5)
    assert compare.main([str(a.root), str(b.root)]) == 0
    out = capsys.readouterr().out
    assert "+100.00 [+100.00, +100.00] | 0/8 | B is better" in out and "h2o" not in out
    assert "+0.00 [+0.00, +0.00] | 0/0 | tie" in out  # the full cache with itself


def test_only_samples_that_both_have_count(book, capsys):
    book.cell("nacl", [1.0, None, 1.0], 0.5)
    book.cell("snapkv", [1.0, 1.0, None], 0.5)
    assert compare.main(["nacl", "snapkv", "--results", str(book.root)]) == 0
    assert "| 1 | 100.00 | 100.00 |" in capsys.readouterr().out


def test_an_unknown_name_lists_what_there_is(book, capsys):
    book.cell("nacl", [1.0], 0.5)
    assert compare.main(["nacl", "snapvk", "--results", str(book.root)]) == 2
    assert "snapvk: neither a folder nor a method" in capsys.readouterr().err
