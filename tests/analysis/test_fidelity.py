"""The fidelity panel: worked numbers of single samples, panels of cells and their labels."""

import math

import pytest

from analysis.fidelity.numbers import (
    Answer,
    Forced,
    answer_of,
    first_divergence,
    forced_of,
    is_early,
    is_runaway,
    loop,
    repetition,
    shared_prefix,
)  # fmt: skip
from analysis.fidelity.panel import Sample, panel, sample_of
from analysis.frontier import main, summary
from analysis.load import load_results
from analysis.pages.fidelity import ANCHORS, NUMBERS, draw, has_panels
from analysis.points import points
from analysis.report import page
from analysis.tables import grid, snapshot

E = 0  # the end token
FULL = (5, 6, 7, 8, 9, E)


@pytest.mark.parametrize(
    ("ours", "stop", "at", "share", "ratio", "runaway"),
    [
        ((5, 6, E), "end", 2, 1 / 3, 2 / 5, False),
        ((5, 6, 7, 1, 9, E), "end", 3, 1 / 2, 1, False),
        ((5, 6, 7, 8, 9, 9, 9, 9), "length", 5, 5 / 6, 8 / 5, True),
        (FULL, "end", None, 1, 1, False),
    ],
)
def test_two_answers_part_at_their_first_different_token(ours, stop, at, share, ratio, runaway):
    full, mine = Answer(FULL, "end"), Answer(ours, stop)
    assert first_divergence(full.ids, mine.ids) == at
    assert shared_prefix(full.ids, mine.ids) == pytest.approx(share)
    assert len(mine.text_ids) / len(full.text_ids) == pytest.approx(ratio)
    assert is_runaway(mine, full) == runaway


@pytest.mark.parametrize(("agree", "identical", "prefix"), [(0.99, 0.366, 62.8), (0.999, 0.905, 95.1)])
def test_few_answers_are_identical_long_before_anything_is_wrong(agree, identical, prefix):
    """Of answers of 100 tokens that agree at every token with this probability, parted at every place in turn."""
    full = tuple(range(100))
    parted = [(*full[:d], -1, *full[d + 1 :]) for d in range(100)]
    chance = [agree**d * (1 - agree) for d in range(100)]
    same = agree**100
    assert same == pytest.approx(identical, abs=5e-4)
    mean = sum(p * 100 * shared_prefix(full, ours) for p, ours in zip(chance, parted, strict=True)) + 100 * same
    assert mean == pytest.approx(prefix, abs=0.05)


def test_an_early_end_has_less_than_half_of_an_answer_of_eight_tokens_or_more():
    long, short = Answer((*range(1, 9), E), "end"), Answer((*range(1, 8), E), "end")
    three, four = Answer((1, 2, 3, E), "end"), Answer((1, 2, 3, 4, E), "end")
    assert is_early(three, long) and not is_early(four, long) and not is_early(three, short)
    assert not is_early(Answer((1, 2, 3), "length"), long) and not is_early(three, Answer(tuple(range(9)), "length"))
    assert is_early(Answer((1, 2), "string"), long)


def test_repetition_counts_runs_of_four_tokens():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 1, 2]) == pytest.approx(0.428571, abs=5e-7)
    assert repetition([7] * 100) == pytest.approx(0.989691, abs=5e-7)
    assert repetition([7, 7, 7]) == 0


def test_a_loop_goes_round_three_times_and_takes_24_tokens():
    other, letters = [101, 102, 103], list(range(1, 11))
    assert loop(other + [1, 2] * 12) == 2
    assert loop(other + [1, 2] * 11) is None
    assert loop(other + letters * 3) == 10
    assert loop(other + letters * 2) is None
    assert loop([9] * 24) == 1 and loop([9] * 23) is None
    assert loop(list(range(128)) * 3) == 128 and loop(list(range(129)) * 3) is None


def worked(counted: int = 1) -> Forced:
    return Forced((0.0, 0.040078, 0.027113), (2,), (2,), counted)


def test_places_before_the_compressed_cache_are_left_out():
    assert worked().mean == pytest.approx(0.033595, abs=1e-6)
    assert worked().largest == (0.040078, 1)
    assert worked().share(worked().differ) == worked().share(worked().clear) == 0.5
    assert worked(0).mean == pytest.approx(0.022397, abs=1e-6)


def test_a_line_of_a_record_gives_its_first_answer_and_older_ones_none():
    assert answer_of({"score": 1.0, "stop": "end"}) is None and forced_of({"score": 1.0}) is None
    assert answer_of({"ids": [5, 0], "stop": "end", "blank": True}) == Answer((5, 0), "end", True)
    assert answer_of({"turns": [{"ids": [5], "stop": "length"}, {"ids": [6], "stop": "end"}]}) == Answer((5,), "length")
    row = {"forced": {"kl": [0.0, None], "differ": [1], "clear": [], "counted": 1, "dnll": None, "flip": 1}}
    found = forced_of(row)
    assert found == Forced((0.0, None), (1,), (), 1, None, 1) and found is not None and not found.is_finite


WHOLE = Answer((1, 2, 3, 4, 5, 6, 7, 8, E), "end")


def near_by(kl: float = 0.01, differ: tuple = (), first: float = 0.0) -> Forced:
    return Forced((first, kl, kl), differ, differ, 1, 0.0)


CLOSE = near_by()


def samples(n: int, ours: Answer = WHOLE, forced: Forced | None = CLOSE, worse: int = 0, bad: Answer = WHOLE):
    """n samples of a cell, the first `worse` of which have a bad answer."""
    return [Sample(f"s{i:03}", "QA/qa", bad if i < worse else ours, WHOLE, forced) for i in range(n)]


def label(*args, compressed: bool = True, **kw) -> str:
    found = panel(samples(*args, **kw), compressed, resamples=200)
    assert found is not None
    return found.label


def test_a_long_answer_does_not_outvote_short_ones():
    short, long = Forced((0.0, 0.4), (), (), 1, 0.4), Forced((0.0, *[0.1] * 9), (), (), 1, 0.1)
    found = panel([Sample("a", "q", WHOLE, WHOLE, short), Sample("b", "q", WHOLE, WHOLE, long, solved=True)], True, 50)
    assert found is not None and found.kl is not None and found.dnll is not None
    assert found.kl.value == pytest.approx(0.25) and found.dnll.value == pytest.approx(0.25)
    assert found.kl_solved == pytest.approx(0.1) and found.kl_q99 == pytest.approx(0.4 - 0.09 * 0.3, abs=0.01)
    assert (found.kl_max, found.kl_most) == (pytest.approx(0.25), 0.4)


def test_the_ratio_of_lengths_is_of_sums():
    full, ours = (5, 40, 100, 10), (5, 20, 200, 160)
    ids = [(Answer(tuple(range(m)), "length"), Answer(tuple(range(n)), "length")) for m, n in zip(ours, full)]
    found = panel([Sample(str(i), "q", mine, theirs) for i, (mine, theirs) in enumerate(ids)], True, 50)
    assert found is not None and found.out_ratio is not None
    assert found.out_ratio.value == pytest.approx(2.48, abs=0.005) and found.cut == 1 and found.kl is None


def test_an_answer_of_one_token_has_no_place_that_counts():
    one = Sample("a", "q", Answer((E,), "end"), Answer((E,), "end"), Forced((1e-8,), (), (), 1))
    found = panel([one, *samples(3)], True, 50)
    assert found is not None and found.kl is not None and found.kl.value == pytest.approx(0.01)
    assert (found.n_forced, found.short, found.uncounted) == (4, 1, 1e-8)


def test_fewer_than_twenty_samples_have_numbers_and_no_label():
    assert label(19) == "" and label(20) == "near"
    found = panel(samples(19, forced=near_by(2.0)), True, 50)
    assert found is not None and found.label == "" and found.kl is not None and found.kl.value == 2


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        (near_by(0.01), "near"),
        (near_by(0.11), "suspect"),
        (near_by(1.1), "far"),
        (near_by(0.01, (1, 2)), "far"),
        (near_by(0.01, (1,)), "suspect"),  # half of the places differ, which is not below 0.5
        (Forced((0.0, None), (), (), 1), "broken"),
        (Forced((0.0, 1.1, 0.0), (), (), 1, 0.0), "suspect"),
        (near_by(0.0), "unread"),
        (near_by(0.0, first=1e-3), "unread"),  # which did not count
        (near_by(1e-12), "near"),
    ],
)
def test_what_was_forced_gives_the_label(forced, expected):
    assert label(20, forced=forced) == expected


def test_a_full_budget_is_never_unread():
    assert label(20, forced=near_by(0.0), compressed=False) == "near"


EMPTY, RUNAWAY, LOOPED = Answer((E,), "end"), Answer(WHOLE.ids[:-1], "length"), Answer((1,) * 24 + (E,), "end")


@pytest.mark.parametrize("bad", [EMPTY, RUNAWAY, LOOPED, Answer((1, 2, 3, E), "end"), Answer((7, E), "end", True)])
def test_faults_that_the_full_cache_does_not_have_break_a_cell(bad):
    assert label(100, worse=25, bad=bad) == "broken"
    assert label(100, worse=6, bad=bad) == "suspect"
    assert label(100, worse=1, bad=bad) == "near"
    assert label(100, worse=6, bad=bad, forced=near_by(1.1)) == "far"
    assert label(100, worse=6, bad=bad, forced=near_by(0.0)) == "unread"


def test_a_model_that_loops_with_its_full_cache_is_not_broken_by_compression():
    rows = [Sample(f"s{i}", "q", LOOPED, LOOPED, near_by()) for i in range(40)]
    found = panel(rows, True, 200)
    assert found is not None and found.label == "near"
    assert found.faults["loop"].full == 1 and found.faults["loop"].excess.value == 0


def test_lengths_alone_can_break_a_cell_or_make_it_suspect():
    assert label(40, Answer((*range(1, 18), E), "end")) == "broken"  # 17 tokens for 8
    assert label(40, Answer((*range(1, 12), E), "end")) == "suspect"
    assert label(40, Answer((*range(1, 10), E), "end")) == "near"


def test_a_forced_pass_that_parts_elsewhere_than_the_free_run_is_counted():
    ours = Answer((1, 2, 9, E), "end")
    same, stale = Forced((0.0,) * 4, (2,), (), 1, 0.0, 2), Forced((0.0,) * 4, (1,), (), 1, 0.0, 1)
    drawn = Forced((0.0,) * 4, (1,), (), 1, 0.0, 1, drawn=True)
    beyond = Forced((0.0,) * 2, (), (), 1, 0.0, None)  # it parts where nothing was forced any more
    found = panel([Sample(f"{i}", "q", ours, WHOLE, one) for i, one in enumerate((same, stale, drawn, beyond))], True)
    assert found is not None and found.apart == 1 and found.drawn and found.divergence == 2
    same_answer = panel(samples(3), True)
    assert same_answer is not None and math.isinf(same_answer.divergence)


def test_intervals_are_those_of_the_scores_bootstrap_and_depend_on_no_order():
    rows = [Sample(f"s{i}", f"QA/{i % 2}", WHOLE, WHOLE, Forced((0.0, 0.01 * i), (), (), 1, 0.0)) for i in range(24)]
    found, turned = panel(rows, True, 200), panel(rows[::-1], True, 200)
    assert found == turned and found is not None and found.kl is not None
    assert found.kl.low < found.kl.value < found.kl.high


def test_a_line_without_ids_leaves_the_panel_blank():
    row = {"ids": [1, 0], "stop": "end"}
    assert sample_of("a", "q", {"stop": "end"}, row) is None and sample_of("a", "q", row, {"stop": "end"}) is None
    assert sample_of("a", "q", row, row) == Sample("a", "q", Answer((1, 0), "end"), Answer((1, 0), "end"))
    assert panel([], True) is None


SAID = {"ids": list(WHOLE.ids), "stop": "end"}


def forced_row(kl: float) -> dict:
    return {**SAID, "forced": {"kl": [0.0, kl, kl], "differ": [], "clear": [], "counted": 1, "dnll": 0.0, "flip": None}}


def cells(book, n: int = 20) -> None:
    """A full cache, and methods that are near, far, and not read at all."""
    book.cell(scores=[1.0] * n, rows=[SAID] * n)
    for method, kl in (("snapkv", 0.01), ("h2o", 1.5), ("tova", 0.0)):
        book.cell(method, [0.9] * n, 0.5, rows=[forced_row(kl)] * n)


def test_points_have_the_panel_of_the_whole_task(book):
    cells(book)
    table = points(load_results(book.root), resamples=50).set_index("method")
    assert table["fidelity"].to_dict() == {"full": "", "snapkv": "near", "h2o": "far", "tova": "unread"}
    assert table.loc["h2o", "kl"] == table.loc["h2o", "kl_max"] == 1.5 and table.loc["h2o", "n_forced"] == 20
    assert table.loc["h2o", "kl_solved"] == 1.5 and table.loc["snapkv", "out_ratio"] == 1
    assert table.loc["full", list(NUMBERS)].isna().all()


def test_of_several_seeds_the_most_harmful_panel_counts(book):
    book.cell(scores=[1.0] * 20, rows=[SAID] * 20)
    for seed, kl in enumerate((0.01, 1.5, 0.2)):
        book.cell("random", [0.9] * 20, 0.5, seed=seed, rows=[forced_row(kl)] * 20)
    table = points(load_results(book.root), resamples=50).set_index("method")
    assert table.loc["random", "fidelity"] == "far" and table.loc["random", "seeds"] == 3


def test_older_records_and_other_contents_leave_the_panel_blank(book):
    book.cell(scores=[1.0] * 20, rows=[{**SAID, "key": "a"}] * 20)
    book.cell("snapkv", [0.9] * 20, 0.5)
    book.cell("h2o", [0.9] * 20, 0.5, rows=[{"key": "a"}] * 20)
    table = points(load_results(book.root), resamples=50)
    assert not has_panels(table) and "fidelity" not in summary(table) and draw(table, "share", "bytes") is None
    assert "fidelity" not in snapshot(load_results(book.root), "x")["points"][0]


def test_tables_figures_and_pages_show_the_panel(book, tmp_path):
    cells(book)
    assert main([str(book.root)]) == 0
    text = (book.root / "frontier.md").read_text()
    assert "| far | 1.5 | 100% |" in text and "| unread | 0 | 100% |" in text
    svg = (book.root / "fidelity.svg").read_text()
    assert all(name in svg for name in [*ANCHORS, "snapkv", "nats per token"])
    assert "kl_q99" in (book.root / "frontier.csv").read_text()
    results = load_results(book.root)
    results.pack(tmp_path / "packed.parquet")
    packed = load_results(tmp_path / "packed.parquet")
    told = snapshot(packed, "x")
    assert {row["label"]: row["fidelity"] for row in told["points"]}["tova"] == "unread"
    assert " far |" in grid(told) and " unread |" in grid(told) and " near |" not in grid(told)
    assert page(results)
