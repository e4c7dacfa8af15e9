"""A sample's bytes are its own, also where its record holds those of the batch that it was computed in."""

import json

import pytest

from analysis import rows
from analysis.records import above, of_sample
from runners.evaluate import cost_rows
from runners.records.record import Record
from runners.report.remarks import misses

BOOK = {
    "n_layers": 2, "full": 800, "full_prompt": 640, "held_prompt": 320, "held_end": 400, "peak_prompt": 640,
    "peak_decode": 420, "mean_decode": 360, "read_step": 400, "workspace": 8, "adapter": 16, "host": 0, "asked": 300,
    "overhead": 20, "per_layer": [160, 160], "nominal_bits": None, "effective_bits": None, "share": 0.5,
}  # fmt: skip
TIMES = {"prompt": 1.0, "question": 0.0, "decode": 1.0, "n_prompt": 40, "steps": 3}


def row(batch: int, **more) -> dict:
    book = {**BOOK, **more}
    return {
        "id": "a/0",
        "score": 1.0,
        "batch": batch,
        "tokens_in": 5,
        "tokens_out": 3,
        "cut": False,
        "threads": 1,
        "ledger": book,
        "timings": TIMES,
    }


def test_a_batchs_ledger_is_shared_out_among_its_rows():
    own = of_sample(row(4))["ledger"]
    assert own["held_prompt"] == 80 and own["full"] == 200 and own["per_layer"] == [40, 40] and own["adapter"] == 4
    assert own["share"] == 0.5 and own["n_layers"] == 2 and own["nominal_bits"] is None


@pytest.mark.parametrize("one", [row(1), row(4, padding=0), {"id": "a/0", "error": "lost"}])
def test_a_ledger_that_is_a_samples_own_stays_as_it_is(one):
    assert of_sample(one) is one


def test_old_records_show_what_they_showed(tmp_path):
    record = Record(tmp_path, {"model": {"name": "m"}, "task": {"name": "t"}, "method": {"name": "x"}, "budget": 0.5})
    record.folder.mkdir(parents=True)
    record.samples_path.write_text(json.dumps(row(4)) + "\n")
    (read,) = record.read().values()
    shown = {what: ours for what, ours, _ in cost_rows([(read, read)])}
    assert shown["KV bytes, end of prompt"] == "80 B (50.0%)"
    assert shown["KV bytes, end of generation"] == "100 B (50.0%)"
    table, book = rows.samples_of("x", record.samples_path)
    assert (table["bytes"][0], table["bytes_full"][0], table["held"][0], table["held_end"][0]) == (80, 160, 0.5, 0.5)
    assert table["peak"][0] == 640 / 800 and book["ledger"]["held_end"] == 100 and book["layers"] == [40, 40]


def test_samples_above_their_budget_are_counted():
    """320 bytes are held where 300 were asked for and 20 are documented."""
    fits, misses_it = row(1, padding=0), row(1, padding=0, held_prompt=321)
    assert [above(one) for one in (fits, misses_it)] == [False, True]
    assert misses([fits, misses_it, fits]) == "1 of 3 above the budget" and misses([fits]) is None
    assert not above({"ledger": {"held_prompt": 9}})  # an older record that does not say
