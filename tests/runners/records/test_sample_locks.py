"""Locks on samples and shared records between processes."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from methods.core.errors import UserError
from runners.records.record import Record
from runners.records.sample_locks import SampleLocks
from runners.records.shared_record import SharedRecord
from tests.rows import done

IDENTITY = {"model": {"name": "m"}, "task": {"name": "t"}, "method": {"name": "nacl"}, "budget": 0.5}
SPAWN = multiprocessing.get_context("spawn")


def hold(folder, ids, ready, release):
    with SampleLocks(folder).hold(ids) as got:
        ready.put(got)
        release.wait(30)


def held_elsewhere(folder, ids):
    """A process that holds these locks: (process, event that lets it go)."""
    ready, release = SPAWN.Queue(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(folder, ids, ready, release))
    process.start()
    assert ready.get(timeout=60)
    return process, release


def test_a_sample_that_another_process_has_cannot_be_claimed_until_it_lets_go(tmp_path):
    process, release = held_elsewhere(tmp_path, ["a", "b"])
    locks = SampleLocks(tmp_path)
    with locks.hold(["c"]) as got:
        assert got
    with locks.hold(["c", "b"]) as got:
        assert not got
    release.set()
    process.join()
    with locks.hold(["c", "b"]) as got:
        assert got


def test_a_killed_process_gives_its_claims_back(tmp_path):
    process, _ = held_elsewhere(tmp_path, ["a"])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with SampleLocks(tmp_path).hold(["a"]) as got:
        assert got


def test_who_waits_gets_the_claim_when_the_other_is_done(tmp_path):
    process, release = held_elsewhere(tmp_path, ["a"])
    release.set()
    began = time.monotonic()
    with SampleLocks(tmp_path).hold(["a"], wait=True) as got:
        assert got and time.monotonic() - began < 30
    process.join()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        SampleLocks(tmp_path / "file" / "below")


def record(folder) -> SharedRecord:
    return SharedRecord(Record(folder, IDENTITY), {"torch": "2"}, {})


def lines(shared: SharedRecord) -> list[dict]:
    return [json.loads(line) for line in shared.record.samples_path.read_text().splitlines()]


def test_two_writers_add_each_sample_once(tmp_path):
    one, two = record(tmp_path), record(tmp_path)
    assert one.add([done("a", 1)], pytest.fail) == 1
    assert two.add([done("a", 1), done("b", 0)], pytest.fail) == 1
    assert one.add([done("b", 0), done("c", 0)], pytest.fail) == 1
    assert [row["id"] for row in lines(one)] == ["a", "b", "c"]
    two.refresh()
    assert two.finished == one.finished == {"a", "b", "c"}


def test_a_failure_is_written_once_and_its_success_after_it(tmp_path):
    one = record(tmp_path)
    assert [one.add([{"id": "a", "error": "no"}], pytest.fail) for _ in range(2)] == [1, 0]
    assert one.finished == set()
    assert one.add([{"id": "a", "error": "other"}], pytest.fail) == 1
    assert one.add([done("a", 1)], pytest.fail) == 1
    assert one.finished == {"a"} and len(lines(one)) == 3


def test_a_line_that_another_process_left_unfinished_is_cut_off_before_the_next(tmp_path):
    one = record(tmp_path)
    one.add([done("a", 1)], pytest.fail)
    with one.record.samples_path.open("a") as file:
        file.write('{"id": "b", "sco')  # its writer was killed
    one.refresh()
    assert one.finished == {"a"}
    one.add([done("b", 1)], pytest.fail)
    assert [row["id"] for row in lines(one)] == ["a", "b"]


def test_a_full_disk_takes_back_no_row_of_another_process(tmp_path, monkeypatch):
    one, two = record(tmp_path), record(tmp_path)
    one.add([done("a", 1)], pytest.fail)
    two.add([done("b", 1)], pytest.fail)
    real = os.write

    def full(file, data):
        real(file, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="cannot write on"):
        one.add([done("c", 1)], pytest.fail)
    assert [row["id"] for row in lines(one)] == ["a", "b"]


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    one = record(tmp_path)
    one.add([done("a", 1)], pytest.fail)
    read = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    one.refresh()
    assert read == []
    record(tmp_path).add([done("b", 1)], pytest.fail)
    read.clear()
    one.refresh()
    assert len(read) == 1


def test_other_conditions_are_refused(tmp_path):
    record(tmp_path).add([done("a", 1)], pytest.fail)
    other = SharedRecord(Record(tmp_path, IDENTITY), {"torch": "3"}, {})
    with pytest.raises(UserError, match="torch was 2, is 3"):
        other.add([done("b", 1)], pytest.fail)
