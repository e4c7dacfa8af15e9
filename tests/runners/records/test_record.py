"""Records on disk: paths made of parameters, lines that survive a kill, one writer at a time."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from methods.core.errors import UserError
from runners.records.record import Record, check_writable, differences, digest
from runners.records.shared_record import SharedRecord
from tests.rows import done

NOW = {"torch": "2.13", "device": "cpu"}


def identity(**changes) -> dict:
    return {
        "model": {"name": "tiny"},
        "task": {"name": "longbench-mini"},
        "method": {"name": "snapkv", "config": {"window": 32, "heads": (1, 2)}},
        "budget": 0.25,
        "seed": 0,
        **changes,
    }


@pytest.fixture
def record(tmp_path) -> Record:
    record = Record(tmp_path / "results", identity())
    record.folder.mkdir(parents=True)
    return record


def write(record: Record, *ids: str) -> None:
    with record.begin(NOW) as writer:
        for id in ids:
            writer.append(done(id, 0.5))


def test_the_path_says_what_was_run_and_nothing_else_decides_it(tmp_path):
    one = Record(tmp_path, identity()).folder
    assert one == Record(tmp_path, identity()).folder
    assert one.parent == tmp_path / "tiny" / "longbench-mini" and one.name.startswith("snapkv-b0.25-")
    turned = dict(reversed(identity().items()))
    assert Record(tmp_path, turned).folder == one
    for change in ({"seed": 1}, {"budget": 0.5}, {"method": {"name": "snapkv", "config": {"window": 31}}}):
        assert Record(tmp_path, identity(**change)).folder != one


def test_a_name_cannot_leave_the_results_folder(tmp_path):
    folder = Record(tmp_path, identity(model={"name": "../../etc"}, task={"name": "a/b c"})).folder
    assert folder.parent == tmp_path / "_.._etc" / "a_b_c"


def test_a_number_of_slots_keeps_its_form_in_the_path(tmp_path):
    assert Record(tmp_path, identity(budget=512)).folder.name.startswith("snapkv-b512-")


def test_each_sample_is_on_disk_before_append_returns(record):
    with record.begin(NOW) as writer:
        writer.append(done("a/0", prediction="ä\n\u2028 \ud800"))
        assert set(record.read()) == {"a/0"}
        (line,) = record.samples_path.read_text().rstrip("\n").split("\n")
    assert json.loads(line)["prediction"] == "ä\n\u2028 \ud800" and json.loads(line)["run"] == 0


def test_a_torn_last_line_is_dropped_and_the_rest_kept(record):
    write(record, "a/0", "a/1")
    whole = record.samples_path.read_bytes()
    for torn in (b'{"id": "a/2", "pre', b"{", b"\x00\x00", b'{"id": "\xc3'):
        record.samples_path.write_bytes(whole + torn)
        assert set(record.read()) == {"a/0", "a/1"}
        write(record)
        assert record.samples_path.read_bytes() == whole


def test_a_last_line_that_only_lacks_its_end_is_kept(record):
    write(record, "a/0", "a/1")
    whole = record.samples_path.read_bytes()
    record.samples_path.write_bytes(whole[:-1])
    assert set(record.read()) == {"a/0", "a/1"}
    write(record, "a/2")
    assert record.samples_path.read_bytes().startswith(whole) and len(record.read()) == 3


def test_damage_in_the_middle_is_named_by_file_and_line(record):
    write(record, "a/0", "a/1")
    lines = record.samples_path.read_text().splitlines()
    record.samples_path.write_text("\n".join([lines[0], "oops", lines[1], ""]))
    with pytest.raises(UserError, match=r"samples\.jsonl, line 2: not a sample's record"):
        record.read()


def test_the_later_line_of_a_sample_counts(record):
    with record.begin(NOW) as writer:
        writer.append({"id": "a/0", "error": "out of memory"})
        writer.append(done("a/0", 1.0))
    assert record.read()["a/0"]["score"] == 1.0 and "error" not in record.read()["a/0"]


def test_a_full_disk_stops_with_what_was_done_whole(record, monkeypatch):
    write(record, "a/0")
    whole = record.samples_path.read_bytes()
    real, calls = os.write, []

    def ten_bytes_then_full(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with record.begin(NOW) as writer:
        monkeypatch.setattr(os, "write", ten_bytes_then_full)
        with pytest.raises(UserError, match=r"No space left on device.*finished samples are kept"):
            writer.append(done("a/1", 0.5))
    assert record.samples_path.read_bytes() == whole


def test_a_disk_that_is_full_before_the_first_sample_is_said_without_a_file_that_has_no_name(record, monkeypatch):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); give"):
        record.begin(NOW)


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(UserError, match=f"results={folder}: cannot be written"):
            check_writable(folder)
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_other_conditions_are_refused_by_name_unless_forced(record):
    write(record, "a/0")
    later = NOW | {"torch": "2.14"}
    record.check_conditions(NOW, force=False)
    with pytest.raises(UserError, match=r"torch was 2\.13, is 2\.14.*resume=force"):
        record.check_conditions(later, force=False)
    record.check_conditions(later, force=True)
    with record.begin(later) as writer:
        writer.append(done("a/1"))
    assert [one["conditions"] for one in record.runs()] == [NOW, later]
    assert {row["id"]: row["run"] for row in record.read().values()} == {"a/0": 0, "a/1": 1}
    record.check_conditions(later, force=False)  # forced once, it goes on under the newer ones


def test_where_every_sample_had_failed_nothing_can_be_mixed_and_nothing_is_refused(record):
    with record.begin(NOW) as writer:
        writer.append({"id": "a/0", "error": "out of memory"})
    record.check_conditions(NOW | {"torch": "2.14"}, force=False)
    write(record, "a/1")
    with pytest.raises(UserError, match=r"torch was 2\.13"):
        record.check_conditions(NOW | {"torch": "2.14"}, force=False)


def test_another_code_has_another_folder(tmp_path):
    one = Record(tmp_path, identity(), {"code": "a"})
    assert one.folder == Record(tmp_path, identity(), {"code": "a"}).folder
    assert one.folder != Record(tmp_path, identity(), {"code": "b"}).folder


def test_notes_are_kept_and_never_compared(record):
    with record.begin(NOW, {"commit": "abc"}):
        pass
    with record.begin(NOW, {"commit": "def"}):
        pass
    (run,) = record.runs()
    assert run["conditions"] == NOW and run["commit"] == "abc"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"runs": [{}]}', '{"runs": null}', "[" * 100_000])
def test_a_cell_file_that_is_missing_or_broken_is_written_again_beside_its_samples(record, text):
    write(record, "a/0")
    record.cell_path.unlink()
    if text is not None:
        record.cell_path.write_text(text)
    assert record.runs() == [] and set(record.read()) == {"a/0"}
    write(record, "a/1")
    book = json.loads(record.cell_path.read_text())
    assert book["identity"] == record.identity and len(book["runs"]) == 1 and set(record.read()) == {"a/0", "a/1"}


def test_no_draft_of_a_cell_file_stays_after_a_full_disk_or_a_killed_process(record, monkeypatch):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            record.begin(NOW)
    assert [path.name for path in record.folder.iterdir()] == []
    (record.folder / ".cell.json.4711").write_text("{")
    write(record, "a/0")
    assert sorted(path.name for path in record.folder.iterdir()) == ["cell.json", "samples.jsonl"]


def test_samples_whose_folder_is_deleted_while_they_are_written_are_not_lost_without_a_word(record):
    with record.begin(NOW) as writer:
        writer.append(done("a/0"))
        shutil.rmtree(record.folder)
        with pytest.raises(UserError, match=r"were deleted or cut while this run was writing them"):
            writer.append(done("a/1"))


def test_a_file_that_cannot_be_read_is_a_users_error(record):
    record.samples_path.mkdir()
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot be read"):
        record.read()
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot be read"):
        shared(record).refresh()


def shared(record: Record) -> SharedRecord:
    return SharedRecord(record, NOW, {})


def test_a_shared_record_keeps_no_file_open_and_notices_when_its_samples_are_deleted(record):
    one = shared(record)
    before = len(os.listdir("/proc/self/fd"))
    assert one.add([done("a/0")], lambda: None) == 1 and one.add([done("a/1"), done("a/0")], lambda: None) == 1
    assert len(os.listdir("/proc/self/fd")) == before and one.finished == {"a/0", "a/1"}
    assert {row["run"] for row in one.rows.values()} == {0}
    shutil.rmtree(record.folder)
    with pytest.raises(UserError, match="were deleted or cut"):
        one.add([done("a/2")], lambda: None)


def _hold(results: Path, began, seconds: float) -> None:
    record = Record(results, identity())
    with record.lock(lambda: None):
        began.set()
        time.sleep(seconds)
        write(record, "first")


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path):
    context = multiprocessing.get_context("fork")
    began = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, began, 0.5))
    other.start()
    assert began.wait(30)
    said = []
    record = Record(tmp_path, identity())
    with record.lock(lambda: said.append("waiting")):
        assert set(record.read()) == {"first"}  # it had finished before this one came in
        write(record, "second")
    other.join()
    assert said == ["waiting"] and set(record.read()) == {"first", "second"}


def _write_many(results: Path, name: str) -> None:
    record = Record(results, identity())
    for i in range(5):
        with record.lock(lambda: None):
            write(record, f"{name}/{i}")


def test_two_processes_on_one_cell_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_write_many, args=(tmp_path, name)) for name in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join()
    record = Record(tmp_path, identity())
    assert set(record.read()) == {f"{name}/{i}" for name in "ab" for i in range(5)}
    assert len(record.samples_path.read_text().splitlines()) == 10


def test_a_lock_does_not_outlive_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    began = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, began, 60))
    other.start()
    assert began.wait(30)
    other.kill()
    other.join()
    with Record(tmp_path, identity()).lock(lambda: None):
        pass


def test_differences_name_both_sides():
    assert (
        differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5})
        == "b was 2, is 4, c was 3, is None, d was None, is 5"
    )


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
