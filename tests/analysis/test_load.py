"""Reading result folders, whole and broken ones."""

import errno
import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.load import CACHE, NothingToRead, load_results, sample_texts
from analysis.points import points


def test_a_folder_on_a_read_only_file_system_is_read_without_a_cache(book, monkeypatch):
    book.cell(scores=[1.0, 0.5])

    def read_only(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # also for a file that is not there
    assert load_results(book.root).finished["score"].tolist() == [1.0, 0.5]


def test_cells_and_samples_are_read(book):
    book.cell(scores=[1.0, 0.5])
    book.cell("nacl", [0.0, None], 0.25)
    found = load_results(book.root)
    assert sorted(found.cells["method"]) == ["full", "nacl"] and not found.problems
    assert found.finished["score"].tolist() == [1.0, 0.5, 0.0]
    assert found.samples.query("error != ''")["error"].tolist() == ["no memory"]
    assert found.finished["held"].tolist() == [1.0, 1.0, 0.25]
    assert set(found.finished["category"]) == {"QA"}


def test_a_second_load_reads_only_what_changed(book, monkeypatch):
    book.cell(scores=[1.0])
    changed = book.cell("nacl", [0.0], 0.5)
    before = load_results(book.root)
    with (changed / "samples.jsonl").open("a") as file:
        line = json.loads((changed / "samples.jsonl").read_text())
        file.write(json.dumps({**line, "id": "qa/9", "score": 1.0}) + "\n")
    import analysis.load as module

    read = []
    monkeypatch.setattr(
        module, "samples_of", lambda name, path, old=module.samples_of: read.append(name) or old(name, path)
    )
    after = load_results(book.root)
    assert read == [changed.relative_to(book.root).as_posix()]
    assert len(after.samples) == len(before.samples) + 1
    read.clear()
    pd.testing.assert_frame_equal(load_results(book.root).samples, after.samples)
    assert read == []


def test_what_was_said_of_a_record_is_said_again_when_it_comes_from_the_cache(book):
    torn = book.cell(scores=[1.0])
    with (torn / "samples.jsonl").open("a") as file:
        file.write('{"id": "qa/7", "sco')
    first = load_results(book.root)
    again = load_results(book.root)
    assert first.problems == again.problems and "line 2" in again.problems[0]
    assert first.cells["layers"].tolist() == again.cells["layers"].tolist() == [[500, 500]]
    assert again.cells["ledger"].iloc[0]["held_prompt"] == 1000


def test_a_damaged_cache_is_made_again(book):
    book.cell(scores=[1.0])
    load_results(book.root)
    (book.root / CACHE).write_bytes(b"no parquet")
    assert load_results(book.root).finished["score"].tolist() == [1.0]
    pd.read_parquet(book.root / CACHE).assign(more=1).to_parquet(book.root / CACHE)  # of another version
    assert load_results(book.root).finished["score"].tolist() == [1.0]
    load_results(book.root).samples.to_parquet(book.root / CACHE)  # without what stands beside the table
    assert load_results(book.root).finished["score"].tolist() == [1.0]


def test_broken_records_are_named_and_the_rest_is_given(book):
    book.cell(scores=[1.0])
    torn = book.cell("nacl", [0.0, 1.0], 0.5)
    with (torn / "samples.jsonl").open("a") as file:
        file.write('{"id": "qa/7", "sco')
    (book.cell("h2o", [1.0], 0.5) / "cell.json").write_text("{")
    newer = book.cell("tova", [1.0], 0.5)
    (newer / "cell.json").write_text((newer / "cell.json").read_text().replace('"format": 1', '"format": 99'))
    (book.cell("window", [1.0], 0.5) / "samples.jsonl").unlink()
    book.cell("snapkv", [1.0, 0.0], 0.5, conditions=2)
    found = load_results(book.root)
    said = "\n".join(found.problems)
    assert "h2o" in said and "format 99" in said and "line 3" in said and "mixed" in said
    assert sorted(found.cells["method"]) == ["full", "nacl", "snapkv", "window"]
    assert len(found.finished) == 5


def test_half_a_character_hides_no_record(book):
    book.cell(
        scores=[1.0, 0.0], rows=[{"tags": {"category": "\ud800"}}, {"id": "qa/\ud800"}], subsets=[("qa", "QA")] * 2
    )
    found = load_results(book.root)
    assert not found.problems and found.finished["score"].tolist() == [1.0, 0.0]
    assert found.finished["id"].tolist() == ["qa/0", "qa/?"]


@pytest.mark.parametrize("text", [None, "", "[" * 100_000])
def test_a_record_without_its_cell_file_is_named_with_what_would_mend_it(book, text):
    book.cell(scores=[1.0])
    lost = book.cell("nacl", [1.0], 0.5) / "cell.json"
    lost.unlink()
    if text is not None:
        lost.write_text(text)
    (said,) = load_results(book.root).problems
    assert (
        said.startswith("tiny/quiz-mini/nacl-") and "its cell.json is missing or broken; the command that made" in said
    )


def test_an_empty_or_missing_folder_says_what_would_work(tmp_path):
    with pytest.raises(NothingToRead, match="no such folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(NothingToRead, match=r"run\.py"):
        load_results(tmp_path)


def test_texts_are_read_from_the_record_when_they_are_wanted(book):
    cell = book.cell(scores=[1.0, 0.0], predictions=["a", "<b>"])
    book.cell("nacl", [1.0], 0.5)
    found = sample_texts(load_results(book.root), cell.relative_to(book.root).as_posix(), {"qa/1"})
    assert found["qa/1"]["prediction"] == "<b>" and list(found) == ["qa/1"]
    assert (
        sample_texts(load_results(book.root), cell.relative_to(book.root).as_posix(), {"qa/0"})["qa/0"]["prediction"]
        == "a"
    )


def test_a_sample_that_was_computed_twice_counts_once_as_the_later_one(book):
    cell = book.cell(scores=[None, 1.0], predictions=["", "é"])
    line = json.loads((cell / "samples.jsonl").read_text().splitlines()[1])
    with (cell / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**line, "id": "qa/0", "prediction": "later"}, ensure_ascii=False) + "\n")
    found = load_results(book.root)
    assert found.finished["id"].tolist() == ["qa/0", "qa/1"] and not found.errors
    assert sample_texts(found, found.cells.index[0], {"qa/0", "qa/1"})["qa/0"]["prediction"] == "later"


def test_a_line_that_lacks_something_is_named_and_the_other_samples_are_given(book):
    book.cell(scores=[1.0, 1.0, 0.0], rows=[{}, {"ledger": {}}, {"timings": None}])
    found = load_results(book.root)
    assert found.finished["id"].tolist() == ["qa/0"] and len(found.problems) == 2
    assert "line 2" in found.problems[0] and "line 3" in found.problems[1]


def test_a_sample_without_a_prompt_pass_has_no_share_of_one(book):
    ledger = {"full": 0, "full_prompt": 0, "held_prompt": 0, "held_end": 0, "read_step": 0, "peak_prompt": 0,
              "peak_decode": 0}  # fmt: skip
    book.cell(scores=[1.0], rows=[{"ledger": ledger}])
    found = load_results(book.root)
    assert not found.problems and found.finished["held"].isna().all() and found.finished["score"].tolist() == [1.0]


def test_packed_records_are_read_like_a_folder(book, tmp_path):
    book.cell(scores=[1.0, 0.5])
    book.cell("nacl", [0.0, None], 0.25)
    whole = load_results(book.root)
    whole.pack(tmp_path / "records.parquet")
    found = load_results(tmp_path / "records.parquet")
    pd.testing.assert_frame_equal(points(found), points(whole))
    pd.testing.assert_frame_equal(found.cells, whole.cells)
    assert found.finished["prompt_s"].tolist() == [0.5, 0.5, 0.5]
    assert found.errors == whole.errors == {whole.cells.index[1]: ["no memory"]}
    assert sample_texts(found, found.cells.index[0], {"qa/0"}) == {}
    old = pd.read_parquet(tmp_path / "records.parquet")  # packed before samples were held to their budgets
    old.drop(columns="above").to_parquet(tmp_path / "records.parquet")
    pd.testing.assert_frame_equal(points(load_results(tmp_path / "records.parquet")), points(whole))
    (tmp_path / "records.parquet").write_bytes(b"something else")
    with pytest.raises(NothingToRead, match="not a file that"):
        load_results(tmp_path / "records.parquet")


def test_shared_passes_have_no_speed_and_weights_chance_and_measure_are_read(book):
    text = {"group": 3, "weights": {"": 7.0}, "curve": [[0, 7, 1.0]], "parts": {"": 1.0}}
    asked = {"parts": {"acc": 1.0, "f1": 0}, "tags": {"gold": 0, "n": 4, "control": True}}
    book.cell(scores=[1.0, 1.0], rows=[text, asked])
    found = load_results(book.root).finished
    assert found["alone"].tolist() == [False, True] and found["weight"].tolist() == [7.0, 1.0]
    assert found["chance"].tolist() == [0.0, 0.25] and found["measure"].tolist() == ["", "acc"]
    assert found["control"].tolist() == [False, True]


def test_a_sample_is_labelled_with_the_part_that_is_its_score(book):
    rouge = {"parts": {"ROUGE-1": 0.9, "ROUGE-2": 0.4, "ROUGE-L": 0.5, "ROUGE-Lsum": 0.9}}
    read = {"parts": {"strict": 0.0, "flexible": 0.5}}
    book.cell(scores=[0.5, 0.5, 0.0], rows=[rouge, read, read | {"measure": "strict"}])
    assert load_results(book.root).finished["measure"].tolist() == ["ROUGE-L", "flexible", "strict"]
