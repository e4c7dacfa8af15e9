"""Records with one field made wrong: each is read, or is left out in one line that names it, and no other with it."""

import json
import re
from dataclasses import replace

import pytest

from analysis import records
from analysis.load import load_results
from analysis.points import points
from tests.rows import done
from tests.wrong.fields import WRONG, changed, every, text

METRIC = {"name": "F1", "unit": "points of 100", "better": "higher", "scale": 100, "digits": 2}
DRAWN = 12  # of the records that a wrong value leaves readable, beside the full cache


def whole(book, method, scores):
    notes = {"mean_over": "categories"}
    return book.cell(method, scores, began="2026-01-01T00:00:00Z", files="f", notes=notes, metric=METRIC)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
def test_a_wrong_field_of_a_cell_file_costs_no_other_record(book, part):
    """Wrong values of all fields, each in a record of its own beside the others; part: a third of them."""
    full, made = whole(book, "full", [1.0, 0.0]), whole(book, "nacl", [1.0, 0.5])
    right, samples = json.loads((made / "cell.json").read_text()), (made / "samples.jsonl").read_text()
    wrong = [one for n, one in enumerate(every(right)) if (n + n // len(WRONG)) % 3 == part]
    for number, (_, _, cell) in enumerate(wrong):
        folder = made.with_name(f"wrong-{number}")
        folder.mkdir()
        (folder / "cell.json").write_text(text(cell))
        (folder / "samples.jsonl").write_text(samples)
    found = load_results(book.root, all_generations=True)
    out = [line.partition(": left out, ")[0] for line in found.problems]
    assert len(out) == len(set(out)) and all(len(line.splitlines()) == 1 for line in found.problems)
    assert len(found.cells) + len(out) == len(wrong) + 2 and len(out) > len(wrong) / 3
    assert full.relative_to(book.root).as_posix() in found.cells.index
    kept = [name for name in found.cells.index if "/wrong-" in name]
    for name in kept[:: len(kept) // DRAWN]:
        own = found.cells["cell"].isin([name, full.relative_to(book.root).as_posix()])
        points(replace(found, cells=found.cells[own], samples=found.samples))


def test_a_wrong_field_of_a_sample_costs_no_other_sample(book):
    """All wrong values of all fields, each a line of one record."""
    first = json.loads((whole(book, "h2o", [1.0]) / "samples.jsonl").read_text())
    wrong = list(every(first | {"parts": {"F1": 0.5}, "measure": "F1", "key": "k"}))
    ids = [f"qa/{number}" for number in range(len(wrong))]
    own = [
        row | {"id": id} if isinstance(row, dict) and field != "id" else row for (field, _, row), id in zip(wrong, ids)
    ]
    whole(book, "full", [1.0] * len(wrong))
    record = whole(book, "nacl", [1.0])
    (record / "samples.jsonl").write_text("".join(f"{text(row)}\n" for row in own))
    found = load_results(book.root)
    name = record.relative_to(book.root).as_posix()
    said = re.findall(
        rf"^{name}: line (\d+) of samples\.jsonl is no sample, left out \(.+\)$", "\n".join(found.problems), re.M
    )
    out = {int(number) - 1 for number in said}
    assert len(said) == len(out) == len(found.problems) > len(wrong) / 3
    assert {ids[n] for n, (field, _, _) in enumerate(wrong) if n not in out and field != "id"} <= set(
        found.samples.loc[found.samples["cell"] == name, "id"]
    )
    assert {wrong[n][0] for n in range(len(wrong)) if n not in out} >= {
        "prediction",
        "ledger.share",
    }  # which nobody reads
    table = points(found)
    assert table.select_dtypes("number")["score"].notna().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None, "0.5", "missing"])
def test_a_sample_without_a_finite_score_is_left_out_by_file_and_line(book, wrong):
    path = book.cell(scores=[1.0, 0.0]) / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1].pop("score")
    lines[1] |= {} if wrong == "missing" else {"score": wrong}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_results(book.root)
    (said,) = found.problems
    assert "line 2 of samples.jsonl is no sample, left out" in said and "score" in said
    assert found.finished["score"].tolist() == [1.0]


@pytest.mark.parametrize(("runs", "said"), [(None, "runs=null"), ("abc", 'runs="abc"'), ([], "runs=[...]"),
                                            ([{}], "runs=[...]")])  # fmt: skip
def test_runs_that_are_none_are_named_and_the_other_records_are_given(book, runs, said):
    book.cell(scores=[1.0])
    path = book.cell("nacl", [1.0], 0.5) / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": runs}))
    found = load_results(book.root)
    assert said in found.problems[0] and "its cell.json is broken" in found.problems[0]
    assert found.cells["method"].tolist() == ["full"]


def test_samples_that_are_a_folder_are_named_and_the_other_records_are_given(book):
    book.cell(scores=[1.0])
    path = book.cell("nacl", [1.0], 0.5) / "samples.jsonl"
    path.unlink()
    path.mkdir()
    found = load_results(book.root)
    assert found.problems[0].endswith(f"left out, {path} cannot be read (Is a directory)")
    assert found.cells["method"].tolist() == ["full"]


def test_the_right_row_fits_and_a_message_names_what_does_not():
    records.check_sample(done("a"), records.SHOWN)
    records.check_sample({"id": "a", "error": "lost"}, records.SHOWN)
    for place, wrong, said in (
        (("ledger", "full"), None, "ledger.full=null: a number, 0 or more is needed"),
        (("ledger",), [1], r"ledger=[...]: an object is needed"),
        (("timings", "steps"), "x" * 99, 'timings.steps="xxx'),
        (("tokens_in",), 10**99, "tokens_in=a huge number: a whole number"),
    ):
        with pytest.raises(ValueError) as found:
            records.check_sample(changed(done("a"), place, wrong), records.SHOWN)
        assert said in str(found.value) and len(str(found.value)) < 120
