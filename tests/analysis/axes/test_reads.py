"""A method whose budget is for what it reads: on the axis of reads, and on no other as if it saved memory."""

import pytest

from analysis import frontier, records, report, tables
from analysis.area import areas
from analysis.load import load_results
from analysis.paired import WHOLE
from analysis.points import on_front, points

LEDGER = {
    "full": 1100, "full_prompt": 1000, "held_prompt": 1062, "held_end": 1168, "read_step": 131, "full_read": 1050,
    "peak_prompt": 1100, "peak_decode": 1200, "per_layer": [531, 531], "binds": "read", "asked": 262, "overhead": 62,
    "padding": 0, "read_turn": 0, "moved_step": 0, "moved_turn": 0, "host": 0,
}  # fmt: skip


def fill(book, **ledger):
    book.cell(scores=[1.0] * 4)
    book.cell("snapkv", [1.0, 0, 0, 0], 0.25)
    rows = [{"ledger": LEDGER | ledger}] * 4
    book.cell("quest", [1.0] * 4, 0.25, rows=rows, notes={"binds": "read", "family": "selection"})


@pytest.fixture
def whole(book):
    def table(x, **ledger):
        fill(book, **ledger)
        results = load_results(book.root)
        found = points(results, x)
        return results, found[found["category"] == WHOLE].set_index("label", drop=False).rename_axis(None)

    return table


def test_on_the_axis_of_held_bytes_it_is_on_no_front_and_under_no_area(whole):
    results, table = whole("held")
    assert table["off_axis"].to_dict() == {"full": False, "snapkv": False, "quest (reads)": True}
    assert not on_front(table)["quest (reads)"] and table.loc["quest (reads)", "share"] == pytest.approx(1.062)
    assert set(areas(results, table)["method"]) == {"snapkv"}
    line = frontier.summary(table).set_index("method").loc["quest (reads)"]
    assert (line["bytes held"], line["note"]) == ("106.2%", "reads 12.5%")


def test_on_the_axis_of_reads_it_lies_at_the_mean_of_its_steps_beside_all_others(whole):
    results, table = whole("read")
    assert not table["off_axis"].any() and table.loc["quest (reads)", "share"] == pytest.approx(131 / 1050, abs=1e-3)
    assert on_front(table)["quest (reads)"]
    assert set(areas(results, table, "read")["method"]) == {"snapkv", "quest (reads)"}


def test_the_figure_of_held_bytes_leaves_it_out_and_one_of_reads_stands_beside_it(book, capsys):
    fill(book)
    assert frontier.main([str(book.root)]) == 0
    out = book.root
    assert (out / "frontier-read.png").exists() and "quest (reads)" in (out / "frontier-read.svg").read_text()
    assert "quest (reads)" not in (out / "frontier.svg").read_text()
    page = (out / "frontier.md").read_text()
    assert "By bytes read" in page and "12.5%" in page.partition("By bytes read")[2]


def test_nothing_new_is_drawn_where_every_budget_is_for_what_is_held(book):
    book.cell(scores=[1.0] * 4)
    book.cell("snapkv", [1.0, 0, 0, 0], 0.25)
    assert frontier.main([str(book.root)]) == 0
    assert not (book.root / "frontier-read.png").exists()


def test_it_is_above_its_budget_by_what_it_reads_and_not_by_what_it_holds():
    assert not records.above({"ledger": LEDGER})
    assert records.above({"ledger": LEDGER | {"read_step": 263}})
    assert not records.above({"ledger": LEDGER | {"read_step": 1062, "full_read": 0}})  # nothing followed the prompt


def test_an_older_record_reads_what_its_last_step_did_of_a_full_cache_at_the_end(book):
    book.cell(scores=[1.0])
    book.cell("snapkv", [1.0], 0.25)
    table = points(load_results(book.root), "read").set_index("label")
    assert table.loc["snapkv", "share"] == 0.25 and table.loc["snapkv", "binds"] == "held"


def test_a_committed_table_has_what_is_read_beside_what_is_held(book):
    fill(book)
    table = tables.grid(tables.snapshot(load_results(book.root), "make"))
    (line,) = [line for line in table.splitlines() if "quest (reads)" in line]
    assert "106.2%, 12.5% read" in line and table.count("% read") == 1


def test_the_page_knows_which_points_the_axis_of_held_bytes_shows_nothing_of(book):
    fill(book)
    results = load_results(book.root)
    table = points(results)
    data = report.contents(results, table.assign(front=on_front(table)))["points"]
    (i,) = {i for i, label in enumerate(data["label"]) if label == "quest (reads)" and data["category"][i] == WHOLE}
    assert data["off_axis"][i] and data["read"][i] == pytest.approx(131 / 1050, abs=1e-4) and not data["front"][i]
