"""What a score is worth beyond the slots that are pinned anyway, from records."""

import numpy as np
import pandas as pd
import pytest

from analysis import audit
from analysis.audit.frames import frames
from analysis.audit.worth import table
from analysis.load import load_results

NONE, BOUNDARY = {"pin": "none"}, {"pin": "boundary"}


def shares(n: int, share: float) -> list[float]:
    return [share] * n


def rows(book) -> pd.DataFrame:
    results = load_results(book.root)
    found = table(list(frames(results)))
    return found.set_index(["method", "pin"]) if len(found) else found


def test_worth_of_score_and_pins_add_up(book):
    book.cell(scores=shares(20, 1.0))
    book.cell("snapkv", shares(20, 0.30), 0.5, config=NONE)
    book.cell("snapkv", shares(20, 0.62), 0.5, config=BOUNDARY)
    for pin, share in ((NONE, 0.10), (BOUNDARY, 0.55)):
        book.cell("snapkv", shares(20, share), 0.5, config={**pin, "score_by": "random"})
    found = rows(book)
    boundary, none = found.loc["snapkv", "boundary"], found.loc["snapkv", "none"]
    assert boundary["W"] == pytest.approx(7) and none["W"] == pytest.approx(20)
    assert boundary["pin_text"].split()[0] == "+45.00" and boundary["interaction_text"].split()[0] == "-13.00"
    assert boundary["score"] - none["random"] == pytest.approx(45 + 7)
    assert boundary["gap"] == pytest.approx(7 / 45) and none["gap"] == pytest.approx(20 / 90)
    assert none["pin_text"] == none["interaction_text"] == ""


def test_seeds_are_averaged_in_a_sample_and_a_worth_that_holds_zero_is_chance(book):
    book.cell(scores=[1.0] * 4)
    book.cell("snapkv", [1, 1, 0, 1], 0.5, config=BOUNDARY)
    for seed, scores in enumerate(([1, 0, 1, 1], [0, 0, 0, 1])):
        book.cell("snapkv", scores, 0.5, config={**BOUNDARY, "score_by": "random"}, seed=seed)
    row = rows(book).loc["snapkv", "boundary"]
    assert row["W"] == pytest.approx(25) and row["seeds"] == 2 and row["verdict"] == "chance"
    assert row["low"] < 0 < row["high"] and row["smallest"] == pytest.approx((row["high"] - row["low"]) / 2)
    # of the differences .5, 1, -.5, 0 the standard error is .323, of which the interval is a little less than two
    assert row["smallest"] == pytest.approx(1.96 * 32.3 * (3 / 4) ** 0.5, rel=0.15)
    assert row["spread"] == pytest.approx(np.std([75, 25], ddof=1))


def test_a_worth_above_and_one_below_chance_are_told_and_corrected_together(book):
    book.cell(scores=[1.0] * 24)
    for budget, own, null in ((0.5, 1.0, 0.0), (0.25, 0.0, 1.0)):
        book.cell("snapkv", [own] * 23 + [0.5], budget, config=BOUNDARY)
        book.cell("snapkv", [null] * 23 + [0.5], budget, config={**BOUNDARY, "score_by": "random"})
    found = table(list(frames(load_results(book.root)))).set_index("budget")
    assert list(found.loc[[0.5, 0.25], "verdict"]) == ["above chance", "below chance"]
    assert list(found["p"]) == pytest.approx([2 * 2 * np.exp(-11.5)] * 2)  # Hoeffding's bound of 23 equal signs, twice


def test_random_against_random_is_chance(book):
    book.cell(scores=[1.0] * 40)
    rng = np.random.default_rng(0)
    draws = rng.integers(2, size=(6, 40)).astype(float)
    book.cell("snapkv", draws[0].tolist(), 0.5, config=BOUNDARY)
    for seed in range(5):
        book.cell("snapkv", draws[seed + 1].tolist(), 0.5, config={**BOUNDARY, "score_by": "random"}, seed=seed)
    assert rows(book).loc["snapkv", "boundary"]["verdict"] == "chance"


def test_the_baselines_stand_in_for_a_methods_own_nulls_but_for_its_own_pins(book):
    book.cell(scores=[1.0] * 6)
    for pin in ({}, NONE):
        book.cell("h2o", [1.0] * 6, 0.5, config=pin)
    for method, score in (("random", 0.25), ("recency", 0.5)):
        book.cell(method, [score] * 6, 0.5, config=NONE)
        book.cell(method, [score] * 6, 0.25, config=NONE)  # another budget
        book.cell(method, [score] * 6, 0.5)
    found = rows(book)
    assert list(found.index) == [("h2o", "none")]
    assert found.loc["h2o", "none"]["W"] == 75 and found.loc["h2o", "none"]["recency_text"].startswith("+50.00")


def test_allocation_and_selection_add_up_to_the_score(book):
    book.cell(scores=[1.0] * 6)
    for config, score in (({}, 0.8), ({"score_by": "random_in_counts"}, 0.5), ({"score_by": "random"}, 0.4)):
        book.cell("adakv", [score] * 6, 0.5, config=config)
    row = rows(book).loc["adakv", "own"]
    assert [row[f"{name}_text"].split()[0] for name in ("allocation", "selection")] == ["+10.00", "+30.00"]
    assert row["W"] == pytest.approx(40)


def test_sides_that_hold_different_bytes_are_void(book):
    book.cell(scores=[1.0] * 6)
    book.cell("snapkv", [1.0] * 6, 0.5, config=NONE)
    book.cell("snapkv", [0.0] * 6, 0.5, config={**NONE, "score_by": "random"}, share=0.4)
    assert rows(book).loc["snapkv", "none"]["verdict"] == "void: +25% bytes"


def test_a_task_in_which_less_is_better_has_its_worth_the_other_way(book):
    nats = {"name": "nats", "unit": "nats", "better": "lower", "scale": 1.0, "digits": 3}
    book.cell(scores=[2.0] * 6, metric=nats)
    book.cell("snapkv", [2.5] * 6, 0.5, config=NONE, metric=nats)
    book.cell("snapkv", [3.5] * 6, 0.5, config={**NONE, "score_by": "random"}, metric=nats)
    row = rows(book).loc["snapkv", "none"]
    assert row["W"] == 1.0 and row["gap"] == pytest.approx(1 / 1.5)


def test_the_command_prints_80_columns_and_draws(book, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(1)
    for protocol in ("aware", "agnostic"):
        book.cell(scores=[1.0] * 12, protocol=protocol)
        for pin in (NONE, BOUNDARY):
            for config, seeds in (
                (pin, 1),
                *(({**pin, "score_by": by}, n) for by, n in (("random", 5), ("recency", 1))),
            ):
                for seed in range(seeds):
                    book.cell("snapkv", rng.random(12).tolist(), 0.5, config=config, protocol=protocol, seed=seed)
    assert audit.main([str(book.root)]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(book.root) not in line) <= 80
    for said in ("query_aware", "query_agnostic", "chance", "net of random", "P: pins", "5 seeds", "fixed numbers"):
        assert said in out, said
    assert all((book.root / f"audit.{kind}").stat().st_size for kind in ("png", "svg", "csv", "md"))
    written = pd.read_csv(book.root / "audit.csv")
    assert len(written) == 4 and written["n"].eq(12).all()
    assert audit.main([str(book.root), "--task", "other"]) == 2


def test_records_without_a_null_are_nothing_to_read(book, capsys):
    book.cell(scores=[1.0] * 3)
    book.cell("snapkv", [1.0] * 3, 0.5)
    assert audit.main([str(book.root)]) == 2
    assert "method.score_by=random" in capsys.readouterr().err


def test_few_seeds_are_said(book, capsys):
    book.cell(scores=[1.0] * 3)
    book.cell("snapkv", [1.0] * 3, 0.5, config=NONE)
    book.cell("snapkv", [0.0, 1.0, 0.0], 0.5, config={**NONE, "score_by": "random", "draw": "fresh"})
    audit.main([str(book.root)])
    out = capsys.readouterr().out
    assert "Fewer than 5 seeds" in out and "fresh" in out
    assert (book.root / "audit.md").read_text().startswith("## ")
