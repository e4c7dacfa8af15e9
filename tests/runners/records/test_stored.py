"""Records with one field made wrong, as runs read them: one line that names the file, and never a traceback."""

import json

import pytest

from analysis.records import SHOWN, parse_sample
from methods.core.errors import UserError
from runners.evaluate import cost_rows
from runners.records.generations import Shelf
from runners.records.record import Record
from runners.records.shared_record import SharedRecord
from runners.report import heat_map, latency_report
from runners.report.wandb_runs import ledger, speeds
from tasks.base import Example, as_parts
from tests.rows import done
from tests.wrong.fields import every, text

IDENTITY = {
    "model": {"name": "tiny"},
    "task": {"name": "needle-mini", "fingerprint": {"data": "x"}},
    "method": {"name": "snapkv", "config": {"window": 32}},
    "budget": 0.25,
    "protocol": "aware",
    "dtype": "float32",
    "seed": 0,
}
NOW = {"weights": "w", "code": "c"}
PLACE = "single/512/0/0"
TIMES = {"prompts": [0.2, 0.1], "steps": [0.02, 0.04]}


@pytest.fixture
def record(tmp_path) -> Record:
    record = Record(tmp_path, IDENTITY)
    record.folder.mkdir(parents=True)
    record.begin(NOW, {"modules": {"a": "1"}, "place": "here"}).close()
    record.samples_path.unlink()
    return record


def said(attempt) -> str:
    """The one line with which an attempt was refused; nothing where it ran."""
    try:
        attempt()
    except UserError as error:
        (line,) = str(error).splitlines()
        return line
    return ""


def test_a_wrong_field_of_a_sample_is_named_by_file_and_line_or_shown(record):
    right = done("a", parts={"f1": 0.5}, weights={"f1": 2.0}, measure="f1", curve=[[0, 3, 1.5]], key="k",
                 turns=[{"score": 1.0, "held": 5, "full": 10}])  # fmt: skip
    example = Example("a", "", "", [], 1, {"subset": "qa", "category": "QA"})
    refused = 0
    for field, label, wrong in every(right):
        try:
            row = parse_sample(text(wrong).encode(), SHOWN)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 200, (field, label)
            refused += 1
            continue
        if "error" not in row:
            cost_rows([(row, row)]), as_parts(example, row), ledger([row]), speeds([row])
    assert refused > 150
    shared = SharedRecord(record, NOW, {})
    for wrong in ([], None, 3, "abc", {"id": 3}, {"id": "b"}, done("b", float("nan")), done("b", float("-inf"))):
        record.samples_path.write_text(f"{json.dumps(done('a'))}\n{json.dumps(wrong)}\n")
        for attempt in (record.read, shared.refresh):
            line = said(attempt)
            assert line.startswith(f"{record.samples_path}, line 2: not a sample's record (") and "mend it" in line
    record.samples_path.write_text(f"{json.dumps(done('a'))}\n{'[' * 100_000}\n")
    assert "line 2: not a sample's record (nested too deeply)" in said(record.read)
    record.samples_path.write_text(f"{json.dumps(done('a'))}\n{'[' * 100_000}")  # what a killed run was writing
    assert set(record.read()) == {"a"}


def test_a_wrong_field_of_a_cell_file_hides_that_record_at_most(record):
    right = json.loads(record.cell_path.read_text())
    assert len(Shelf(record.results, "tiny", "needle-mini").of(record, "w", "here")) == 1
    hidden = 0
    for _, _, wrong in every(right):
        record.cell_path.write_text(text(wrong))
        found = Shelf(record.results, "tiny", "needle-mini").of(record, "w", "here")
        hidden += not found
        runs = record.runs()
        assert isinstance(runs, list) and all(isinstance(run["conditions"], dict) for run in runs)
        if runs:
            record.check_conditions(runs[-1]["conditions"], force=False)
    assert hidden > 50


def test_a_record_with_a_wrong_field_is_drawn_or_refused_in_one_line(record):
    """The heat map and the table of times, up to the picture."""
    right = json.loads(record.cell_path.read_text())
    record.samples_path.write_text(json.dumps(done(PLACE, 0.5)) + "\n")
    for _, label, wrong in every({"identity": right["identity"]}):
        record.cell_path.write_text(text(wrong))
        line = said(lambda: heat_map.read_record(record.folder))
        assert not line or line.startswith(f"{record.cell_path}: "), label
    record.cell_path.write_text(json.dumps(right))
    row = done(PLACE, 0.5, times=TIMES, full_times=TIMES)
    for field, label, wrong in every(row):
        record.samples_path.write_text(text(wrong) + "\n")
        for line in (said(lambda: heat_map.read_record(record.folder)), said(lambda: timed(record.folder))):
            places = (f"{record.samples_path}, line 1: ", f"{record.folder}: ")
            assert not line or line.startswith(places), (field, label, line)


def timed(folder) -> None:
    label, rows, _ = latency_report.read(folder)
    latency_report.latency_table([(label, rows)])
    latency_report.curves([(label, rows)], 1)


def test_a_broken_full_cache_beside_it_is_named_and_a_heat_map_is_drawn_without_it(record, capsys):
    record.samples_path.write_text(json.dumps(done(PLACE, 0.5)) + "\n")
    (record.folder.parent / "full-b1-x").mkdir()
    (record.folder.parent / "full-b1-x" / "cell.json").write_text("null")
    (row,), _ = heat_map.read_record(record.folder)
    assert row.score == 0.5 and row.full is None
    assert "full-b1-x/cell.json: not a record that can be read" in capsys.readouterr().err


def test_files_that_are_folders_are_named(record):
    record.samples_path.mkdir()
    assert (
        said(lambda: heat_map.read_record(record.folder)) == f"{record.samples_path}: cannot be read (Is a directory)"
    )
    assert said(lambda: latency_report.read(record.folder)) == f"{record.samples_path}: cannot be read (Is a directory)"
    record.cell_path.unlink()
    record.cell_path.mkdir()
    assert said(record.runs).startswith(f"{record.cell_path}: cannot be read (Is a directory)")


def test_a_ledger_of_nothing_has_no_share():
    row = done("a")
    row["ledger"] = dict.fromkeys(row["ledger"], 0) | {"per_layer": [0]}
    assert cost_rows([(row, row)])[0] == ("KV bytes, end of prompt", "0 B (-)", "0 B (-)")
