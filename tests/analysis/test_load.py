"""Reading result folders, whole and broken ones."""

import json

import pandas as pd
import pytest

from analysis.load import CACHE, NothingToRead, load, texts


def test_cells_and_samples_are_read(book):
    book.cell(scores=[1.0, 0.5])
    book.cell("nacl", [0.0, None], 0.25)
    found = load(book.root)
    assert sorted(found.cells["method"]) == ["full", "nacl"] and not found.problems
    assert found.finished["score"].tolist() == [1.0, 0.5, 0.0]
    assert found.samples.query("error != ''")["error"].tolist() == ["no memory"]
    assert found.finished["held"].tolist() == [1.0, 1.0, 0.25]
    assert set(found.finished["category"]) == {"QA"}


def test_a_second_load_reads_only_what_changed(book, monkeypatch):
    book.cell(scores=[1.0])
    changed = book.cell("nacl", [0.0], 0.5)
    before = load(book.root)
    with (changed / "samples.jsonl").open("a") as file:
        line = json.loads((changed / "samples.jsonl").read_text())
        file.write(json.dumps({**line, "id": "qa/9", "score": 1.0}) + "\n")
    import analysis.load as module

    read = []
    monkeypatch.setattr(module, "_lines", lambda path, name, old=module._lines: read.append(name) or old(path, name))
    after = load(book.root)
    assert read == [changed.relative_to(book.root).as_posix()]
    assert len(after.samples) == len(before.samples) + 1
    read.clear()
    pd.testing.assert_frame_equal(load(book.root).samples, after.samples)
    assert read == []


def test_a_damaged_cache_is_made_again(book):
    book.cell(scores=[1.0])
    load(book.root)
    (book.root / CACHE).write_bytes(b"no parquet")
    assert load(book.root).finished["score"].tolist() == [1.0]


def test_broken_records_are_named_and_the_rest_is_given(book):
    book.cell(scores=[1.0])
    torn = book.cell("nacl", [0.0, 1.0], 0.5)
    with (torn / "samples.jsonl").open("a") as file:
        file.write('{"id": "qa/7", "sco')
    (book.cell("h2o", [1.0], 0.5) / "cell.json").write_text("{")
    newer = book.cell("tova", [1.0], 0.5)
    (newer / "cell.json").write_text((newer / "cell.json").read_text().replace('"format": 1', '"format": 99'))
    (book.cell("window", [1.0], 0.5) / "samples.jsonl").unlink()
    book.cell("snapkv", [1.0], 0.5, conditions=2)
    found = load(book.root)
    said = "\n".join(found.problems)
    assert "h2o" in said and "format 99" in said and "line 3" in said and "mixed" in said
    assert sorted(found.cells["method"]) == ["full", "nacl", "snapkv", "window"]
    assert len(found.finished) == 4


def test_an_empty_or_missing_folder_says_what_would_work(tmp_path):
    with pytest.raises(NothingToRead, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(NothingToRead, match=r"run\.py"):
        load(tmp_path)


def test_texts_are_read_from_the_record_when_they_are_wanted(book):
    cell = book.cell(scores=[1.0, 0.0], predictions=["a", "<b>"])
    book.cell("nacl", [1.0], 0.5)
    found = texts(load(book.root), cell.relative_to(book.root).as_posix(), {"qa/1"})
    assert found["qa/1"]["prediction"] == "<b>" and list(found) == ["qa/1"]
