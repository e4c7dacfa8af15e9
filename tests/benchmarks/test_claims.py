"""Claims of papers against made-up records: which samples and cells are compared, and what speaks for a claim."""

import json
import re

import pytest
import yaml

from analysis.load import NothingToRead, load_results
from analysis.stats import Estimate
from benchmarks import claims, tables
from benchmarks.claims import Records
from methods import method_names
from tests.analysis.conftest import Book


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path / "results")


def records(book) -> Records:
    return Records(load_results(book.root))


def test_an_interval_has_three_verdicts_and_a_tie_is_no_win():
    def said(low, high, border=0.0, strict=True):
        return claims.verdict(Estimate((low + high) / 2, low, high), border, strict)

    assert said(0.1, 2) == "held" and said(-2, -0.1) == "not held" and said(-1, 2) == "cannot be told here"
    assert said(0, 0) == said(0, 2) == said(-2, 0) == "cannot be told here"
    assert said(0, 0, strict=False) == said(0, 2, strict=False) == "held"
    assert said(-0.5, 3, border=-1) == "held" and said(-1.5, 0, border=-1) == "cannot be told here"


def test_nacls_claim_is_tested_on_every_task_by_the_share_that_is_left(book):
    for task, scores in zip(claims.TASKS, ([1.0] * 20, [1.0] * 19 + [0.0], [1.0] * 10 + [0.0] * 10, [0.0] * 20)):
        book.cell(scores=[1.0] * 20, task=task)
        for seed in tables.SEEDS:
            book.cell("nacl", scores, 0.5, task=task, seed=seed)
            book.cell("nacl", [0.0] * 20, 0.25, task=task, seed=seed)
    rows = claims.nacl(records(book)).rows
    verdicts = ["held", "cannot be told here", "not held", "not held"]
    assert [(row.value, row.verdict) for row in rows] == list(zip((100, 95, 50, 0), verdicts))
    assert rows[2].low < 50 < rows[2].high < 95 and rows[2].n == 20 and rows[2].seeds == 3


def test_a_method_that_draws_at_random_needs_three_seeds(book):
    for seed in (0, 1):
        book.cell("nacl", [1.0], 0.5, seed=seed)
        book.cell("h2o", [1.0], 0.5, seed=seed)
    assert len(records(book).samples("quiz-mini", "h2o", 0.5).seeds) == 1
    with pytest.raises(NothingToRead, match=r"nacl at budget 0\.5 .*has 2 of 3 seeds"):
        records(book).samples("quiz-mini", "nacl", 0.5)


def test_seeds_are_drawn_again_as_samples_are(book):
    # samples agree with each other, seeds do not: all that is unsure comes from the seeds
    for seed, score in zip(tables.SEEDS, (0.0, 0.5, 1.0)):
        book.cell("nacl", [score] * 30, 0.5, seed=seed)
        book.cell("keyformer", [0.5] * 30, 0.5, seed=seed)
    book.cell("h2o", [0.25] * 30, 0.5)
    samples = [records(book).samples("quiz-mini", name, 0.5) for name in ("nacl", "keyformer", "h2o")]
    ours = claims.difference("seeds", samples[0], samples[2])
    assert ours.value == pytest.approx(25) and (ours.low, ours.high) == pytest.approx((-25, 75), abs=9)
    assert ours.verdict == "cannot be told here" and ours.seeds == 3
    same = claims.difference("one", samples[1], samples[2])
    assert (same.low, same.value, same.high) == pytest.approx((25, 25, 25)) and same.verdict == "held"


def test_the_methods_that_draw_at_random_are_those_whose_code_reads_a_seed():
    drawing = [
        path.stem
        for path in (tables.HOME / "methods").glob("*.py")
        if re.search(r"\bself\.(method\.)?seed\b", path.read_text())
    ]
    assert sorted(drawing) == sorted(tables.RANDOM)


def test_a_tie_is_no_win_and_layers_left_whole_are_another_method(book):
    for protocol in claims.PROTOCOLS:
        for rate in claims.RATES:
            at = dict(task="needle-mini", protocol=protocol)
            book.cell("streaming_llm", [1.0, 0.0, 0.0, 0.0], 1 / rate, **at)
            book.cell("qfilters", [1.0, 0.0, 0.0, 0.0], 1 / rate, config={"skip": []}, **at)
            book.cell("qfilters", [1.0, 1.0, 1.0, 0.0], 1 / rate, config={"skip": [0, 1]}, share=0.6, **at)
        book.cell("streaming_llm", [1.0] * 4, claims.LEFT_WHOLE, **at)
    plain, whole, equal = [make(records(book)) for make in claims.qfilters()]
    assert [(row.value, row.verdict) for row in plain.rows] == [(0, "cannot be told here")] * 6
    assert [row.value for row in whole.rows] == [50] * 6 and whole.rows[0].low == 0
    assert [row.value for row in equal.rows] == [-25] * 2 and equal.rows[0].high == 0


def test_four_bits_claim_to_lose_no_more_than_a_point(book):
    full = [1.0, 0.0] * 10
    for task, scores in zip(claims.TASKS, (full, full[::-1], [0.0] * 20, [1.0] * 20)):
        book.cell(scores=full, task=task)
        book.cell("kivi", scores, config={"key_bits": 4, "value_bits": 4}, task=task)
    same, swapped, worse, better = claims.kivi(records(book)).rows
    assert swapped.low < -1 < swapped.value == 0 < swapped.high
    assert [row.verdict for row in (same, swapped, worse, better)] == [
        "held", "cannot be told here", "not held", "held",
    ]  # fmt: skip


def test_a_searched_table_is_judged_on_unseen_samples_with_no_more_bytes(book, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ASSETS", tmp_path)
    folder = tmp_path / "kvtuner" / "reference" / "kivi"
    folder.mkdir(parents=True)
    made = (("C2.00", "KV2 KV2", 0.5), ("C2.50", "K4V2 KV2", 0.6), ("C3.00", "KV4 KV2", 0.9), ("C6.00", "KV8 KV4", 1))
    entries = [{"name": name, "table": table, "score": score} for name, table, score in made]
    (folder / "card.json").write_text(json.dumps({"samples": ["qa/0", "qa/1"], "tables": entries}))
    at = dict(task="reasoning-mini")
    book.cell(scores=[1.0] * 8, **at)
    for bits, scores in ((4, [1, 1, 1, 0, 1, 1, 1, 1]), (2, [1, 1, 0, 0, 0, 0, 0, 1])):
        book.cell("kvtuner", scores, share=bits / 16, config={"key_bits": bits, "value_bits": bits}, **at)
    for name, share, scores in (("C2.00", 2, [1, 1, 0, 0, 0, 0, 0, 1]), ("C2.50", 2.5, [1] * 8),
                                ("C3.00", 3, [0, 0, 1, 1, 1, 1, 1, 0]), ("C6.00", 6, [1] * 8)):  # fmt: skip
        book.cell("kvtuner", scores, share=share / 16, config={"table": name}, **at)
    four, two = claims.kvtuner("kvtuner", "kivi", records(book)).rows
    # C2.50 is better on the samples that judge, which the search has not seen: the search's own choice counts
    assert four.what.startswith("C3.00 with 0.7") and (four.value, four.n) == (0, 6)
    assert four.low < 0 and four.verdict == "cannot be told here"
    assert two.what.startswith("no other table") and two.value == pytest.approx(100 / 6) and two.verdict == "not held"


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


def test_records_of_two_types_of_caches_test_no_claim(book):
    for held in (None, "float16"):
        book.cell(scores=[1.0] * 20, task="longbench-mini", cache_dtype=held)
    with pytest.raises(
        NothingToRead, match=r"caches of auto and float16 numbers \(cache\.dtype\).*claims take records of one"
    ):
        records(book).samples("longbench-mini", "full")
