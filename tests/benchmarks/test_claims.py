"""Claims of papers against made-up records: which samples and cells are compared, and what speaks for a claim."""

import json

import pytest
import yaml

from analysis.load import NothingToRead, load
from benchmarks import claims, tables
from benchmarks.claims import Records
from methods import method_names
from tests.analysis.conftest import Book


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path / "results")


def records(book) -> Records:
    return Records(load(book.root))


def test_nacls_claim_is_tested_on_every_task_by_the_share_that_is_left(book):
    for task, scores in zip(claims.TASKS, ([1.0] * 20, [1.0] * 19 + [0.0], [1.0] * 18 + [0.0] * 2, [0.0] * 20)):
        book.cell(scores=[1.0] * 20, task=task)
        book.cell("nacl", scores, 0.5, task=task)
        book.cell("nacl", [0.0] * 20, 0.25, task=task)
    rows = claims.nacl(records(book)).rows
    assert [(row.value, row.holds) for row in rows] == [(100, True), (95, True), (90, False), (0, False)]
    assert rows[2].low < 90 < rows[2].high and rows[2].n == 20


def test_a_tie_is_no_win_and_layers_left_whole_are_another_method(book):
    for protocol in claims.PROTOCOLS:
        for rate in claims.RATES:
            at = dict(task="needle-mini", protocol=protocol)
            book.cell("streaming_llm", [1.0, 0.0, 0.0, 0.0], 1 / rate, **at)
            book.cell("qfilters", [1.0, 0.0, 0.0, 0.0], 1 / rate, config={"skip": []}, **at)
            book.cell("qfilters", [1.0, 1.0, 1.0, 0.0], 1 / rate, config={"skip": [0, 1]}, share=0.6, **at)
        book.cell("streaming_llm", [1.0] * 4, claims.LEFT_WHOLE, **at)
    plain, whole, equal = [make(records(book)) for make in claims.qfilters()]
    assert [(row.value, row.holds) for row in plain.rows] == [(0, False)] * 6
    assert [(row.value, row.holds) for row in whole.rows] == [(50, True)] * 6
    assert [(row.value, row.holds) for row in equal.rows] == [(-25, False)] * 2


def test_a_tie_with_the_full_cache_is_what_four_bits_claim(book):
    full = [1.0, 0.0] * 10
    for task, scores in zip(claims.TASKS, (full, full[::-1], [0.0] * 20, [1.0] * 20)):
        book.cell(scores=full, task=task)
        book.cell("kivi", scores, config={"key_bits": 4, "value_bits": 4}, task=task)
    same, swapped, worse, better = claims.kivi(records(book)).rows
    assert swapped.low < 0 == swapped.value < swapped.high
    assert [row.holds for row in (same, swapped, worse, better)] == [True, True, False, True]


def test_a_searched_table_is_judged_on_unseen_samples_with_no_more_bytes(book, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ASSETS", tmp_path)
    folder = tmp_path / "kvtuner" / "reference" / "kivi"
    folder.mkdir(parents=True)
    entries = [{"name": "C2.00", "table": "KV2 KV2"}, {"name": "C3.00", "table": "KV4 KV2"},
               {"name": "C6.00", "table": "KV8 KV4"}]  # fmt: skip
    (folder / "card.json").write_text(json.dumps({"samples": ["qa/0", "qa/1"], "tables": entries}))
    at = dict(task="reasoning-mini")
    book.cell(scores=[1.0] * 8, **at)
    for bits, scores in ((4, [1, 1, 1, 0, 1, 1, 1, 1]), (2, [1, 1, 0, 0, 0, 0, 0, 1])):
        book.cell("kvtuner", scores, share=bits / 16, config={"key_bits": bits, "value_bits": bits}, **at)
    for name, share, scores in (("C2.00", 2, [1, 1, 0, 0, 0, 0, 0, 1]), ("C3.00", 3, [0, 0, 1, 1, 1, 1, 1, 0]),
                                ("C6.00", 6, [1] * 8)):  # fmt: skip
        book.cell("kvtuner", scores, share=share / 16, config={"table": name}, **at)
    four, two = claims.kvtuner("kvtuner", "kivi", records(book)).rows
    assert four.what.startswith("C3.00 with 0.7") and (four.value, four.n, four.holds) == (0, 6, True)
    assert two.what.startswith("no other table") and two.value == pytest.approx(100 / 6) and not two.holds


def test_a_cell_that_is_not_there_is_named(book):
    book.cell(scores=[1.0])
    with pytest.raises(NothingToRead, match=r"no cell of nacl at budget 0\.5"):
        records(book).samples("quiz-mini", "nacl", 0.5)


def test_every_core_method_meets_every_task_and_has_its_papers_claim():
    sweeps = [" ".join(sweep) for sweep in tables.sweeps("core")]
    for part in ("core", "core-bits", "core-fused"):
        assert f"experiment={part}" in sweeps
        assert f"experiment={part} task=perplexity {tables.TEXTS}" in sweeps
        grid = yaml.safe_load((tables.HOME / "conf" / "experiment" / f"{part}.yaml").read_text())["hydra"]["sweeper"]
        assert grid["params"]["task"] == "longbench,needle,reasoning,summarization"
        expected = yaml.safe_load(tables.EXPECTED["core"].read_text())
        assert set(grid["params"]["method"].split(",")) <= set(expected) <= set(method_names())
