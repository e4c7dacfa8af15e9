"""The numbers of the result table: paired intervals, bytes and speeds."""

from typing import Any

import numpy as np
import pytest

from analysis.records import of_sample
from runners.evaluate import cost_rows
from runners.report import run_table as show
from runners.report.compare import Compared, compare_scores
from runners.report.read_bytes import told
from runners.report.sweep_table import _line
from tasks.base import Example, Row, Task
from tasks.needle import Needle
from tasks.ruler.task import Ruler


class Toy(Task):
    """Scores are handed in; only the averaging of Task is used."""

    name = "toy"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {}

    def source(self) -> str:
        return "toy"

    def examples(self) -> list[Example]:
        return []

    def score(self, example: Example, prediction: str) -> float:
        return 0.0


def scored(**subsets: tuple[str, list[float], list[float]]) -> list[tuple[Example, float, float]]:
    """subset=(category, the method's scores, the full cache's scores)"""
    return [
        (Example(f"{name}/{i}", "c", "q", [], 1, {"subset": name, "category": category}), a, b)
        for name, (category, ours, full) in subsets.items()
        for i, (a, b) in enumerate(zip(ours, full))
    ]


def test_rows_are_the_tasks_own_and_differences_are_theirs():
    rows = compare_scores(Toy(), scored(a=("x", [1, 0], [1, 1]), b=("x", [0.5], [0.25])), resamples=50, seed=0)
    found = {one.row.name: (one.row.score, one.full.score, one.difference) for one in rows}
    assert found == {"a": (50.0, 100.0, -50.0), "b": (50.0, 25.0, 25.0), "x": (50.0, 62.5, -12.5)}


def test_equal_scores_have_an_interval_of_nothing():
    ours = [0.0, 1.0, 0.5, 0.25]
    (row, _) = compare_scores(Toy(), scored(a=("x", ours, ours)), resamples=200, seed=0)
    assert row.interval == (0.0, 0.0)


def test_one_sample_of_a_subset_has_no_interval_and_gives_its_category_none():
    samples = scored(a=("x", [1.0], [0.5]), b=("x", [1.0, 0.0], [0.5, 0.5]))
    found = {one.row.name: one.interval for one in compare_scores(Toy(), samples, resamples=200, seed=0)}
    assert found["a"] is None and found["x"] is None and found["b"] == (-50.0, 50.0)


def test_the_interval_is_the_percentile_one_of_paired_differences():
    rng = np.random.default_rng(1)
    full = rng.random(400)
    ours = np.clip(full - 0.1 + 0.05 * rng.standard_normal(400), 0, 1)
    low, high = compare_scores(Toy(), scored(a=("x", list(ours), list(full))), resamples=2000, seed=0)[0].interval
    differences = 100 * (ours - full)
    half = 1.96 * differences.std() / np.sqrt(400)  # pairing makes it narrow: unpaired it would be four points wide
    assert low == pytest.approx(differences.mean() - half, abs=0.1)
    assert high == pytest.approx(differences.mean() + half, abs=0.1)


def test_a_categorys_interval_weighs_subsets_and_not_samples():
    # the large subset never changes, the small one always loses everything: the category loses half, for certain
    samples = scored(a=("x", [1.0] * 50, [1.0] * 50), b=("x", [0.0] * 2, [1.0] * 2))
    category = next(one for one in compare_scores(Toy(), samples, resamples=100, seed=0) if one.row.name == "x")
    assert category.difference == -50 and category.interval == (-50.0, -50.0)


def test_intervals_do_not_depend_on_what_else_is_in_the_table():
    alone = scored(a=("x", [1.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.0]))
    more = alone + scored(b=("y", [1.0, 0.0], [0.0, 0.0]))
    found = {one.row.name: one.interval for one in compare_scores(Toy(), more, 300, 0)}
    assert compare_scores(Toy(), alone, 300, 0)[0].interval == found["a"] == found["x"] != found["b"]


def place(kind: str, group: str, i: int) -> Example:
    tags = {"subset": kind, "category": group, "length": 100, "depth": None}
    return Example(f"{kind}/{i}", "c", "q", ["a"], 1, tags)


@pytest.mark.parametrize("task", [Toy(), Needle(), Ruler()], ids=lambda task: task.name)
def test_a_subset_called_like_its_category_counts_every_sample_once(task):
    lost, kept, n = 5, 35, 40
    samples = [(place("passkey", "passkey", i), float(i >= lost), 1.0) for i in range(n)]
    assert kept == n - lost
    found = {one.row.name: one.interval for one in compare_scores(task, samples, resamples=4000, seed=0)}
    half = 100 * 1.96 * (lost / n * kept / n / n) ** 0.5  # twice the samples would give 0.7 of it
    low, high = found["passkey"]
    assert low == pytest.approx(-12.5 - half, abs=2.5) and high == pytest.approx(-12.5 + half, abs=2.5)


def test_one_lost_sample_of_eight_is_a_tie_and_one_of_one_has_no_interval():
    samples = [(place("passkey", "passkey", i), float(i > 0), 1.0) for i in range(8)]
    assert compare_scores(Needle(), samples, 4000, 0)[0].interval[1] == 0.0
    assert {one.interval for one in compare_scores(Needle(), samples[:1], 4000, 0)} == {None}


def test_a_category_called_like_one_of_its_subsets_has_a_row_and_an_interval_of_its_own():
    samples = [(place("vt", "vt", i), 0.0, 1.0) for i in range(4)]
    samples += [(place("vt_long", "vt", i), 1.0, 1.0) for i in range(4)]
    rows = {one.row.kind: one for one in reversed(compare_scores(Toy(), samples, 100, 0))}
    assert (rows["subset"].difference, rows["subset"].interval) == (-100.0, (-100.0, -100.0))
    assert (rows["category"].difference, rows["category"].interval) == (-50.0, (-50.0, -50.0))


def test_means_are_taken_of_exact_scores_and_rounded_on_screen_only():
    third = [1.0, 0.0, 0.0]
    rows = compare_scores(Toy(), scored(a=("x", third, third), b=("x", third, third), c=("x", [1.0], [1.0])), 50, 0)
    category = next(one.row for one in rows if one.row.name == "x")
    assert category.score == pytest.approx(500 / 9, abs=1e-9)
    assert show.points(category.score, 2) == "55.56"


def ledger_row(held: int, end: int, batch: int = 1, steps: int = 4) -> dict:
    return {
        "batch": batch,
        "ledger": {"held_prompt": held, "held_end": end, "full_prompt": 1000 * batch, "full": 1100 * batch},
        "timings": {"n_prompt": 500, "prompt": 0.25, "decode": 0.008, "steps": steps},
    }


def test_costs_are_means_of_bytes_with_their_share_and_medians_of_speed():
    pairs = [(ledger_row(400, 500), ledger_row(1000, 1100)), (ledger_row(600, 600, steps=0), ledger_row(1000, 1100))]
    assert cost_rows(pairs) == [
        ("KV bytes, end of prompt", "500 B (50.0%)", "1000 B (100.0%)"),
        ("KV bytes, end of generation", "550 B (50.0%)", "1.07 KiB (100.0%)"),
        ("prefill, tokens/s", "2,000", "2,000"),
        ("decode, ms/token", "2.00", "2.00"),
    ]


def test_a_codecs_bits_stand_in_the_costs():
    ours, full = [ledger_row(400, 500), ledger_row(600, 600)], ledger_row(1000, 1100)
    for row, nominal, effective in zip(ours, (4.0, 3.0), (6.4, 9.6)):
        row["ledger"] |= {"nominal_bits": nominal, "effective_bits": effective}
    rows = cost_rows([(row, full) for row in ours])
    assert rows[2] == ("bits per number, as codes / in all", "3.50 / 8.00", "-")
    assert len(rows) == len(cost_rows([(full, full)])) + 1


def test_reads_and_host_bytes_stand_in_the_costs_and_in_a_sweeps_line_where_there_are_any():
    ours, full = ledger_row(1062, 1168), ledger_row(1000, 1100)
    assert told([full]) == "" and len(cost_rows([(full, full)])) == 4
    ours["ledger"] |= {"binds": "read", "read_step": 131, "full_read": 1050, "asked": 262, "read_turn": 300}
    assert cost_rows([(ours, full)])[2:4] == [
        ("KV bytes read per step", "131 B (12.5%)", "-"), ("KV bytes read by later turns", "300 B", "-"),
    ]  # fmt: skip
    full["ledger"] |= {"host": 500, "moved_step": 64, "read_step": 1000, "full_read": 1000}
    assert told([full]) == (
        "KV bytes held 1000 B (100.0%); KV bytes read per step 1000 B (100.0%); KV bytes on the host 500 B (50.0%); "
        "KV bytes moved per step, host and device 64 B"
    )
    whole = Compared(Row("a", "average", 1, score=1.0), Row("a", "average", 1, score=1.0), None)
    assert _line(whole, [whole], [ours], False)[4] == "12.5% read"


def test_an_older_batchs_bytes_are_shared_among_its_samples():
    alone, together = ledger_row(400, 500), ledger_row(1600, 2000, batch=4)
    assert cost_rows([(of_sample(together), alone)])[0][1:] == ("400 B (40.0%)", "400 B (40.0%)")


def test_samples_that_never_decoded_have_no_speed():
    pairs = [(ledger_row(400, 500, steps=0), ledger_row(1000, 1100, steps=0))]
    assert cost_rows(pairs)[3] == ("decode, ms/token", "-", "-")
