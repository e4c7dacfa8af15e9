"""Hashes of files: kept while path, size and time are the same, and computed again otherwise."""

import hashlib
import os
import time

import pytest

from methods.core.home import hashes
from runners.engine.loading import find


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """The files whose hash was computed, in order; every file counts as a large one."""
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LEAST", 0)
    read, compute = [], hashes._computed
    monkeypatch.setattr(hashes, "_computed", lambda path: read.append(path.name) or compute(path))
    return read


def aged(path, seconds=100):
    """The file, changed so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_file_is_read_once_until_it_changes(tmp_path, computed):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    aged(path)
    assert hashes.sha256(path) == hashes.sha256(path) == hashlib.sha256(b"one").digest()
    assert computed == ["a"]
    path.write_bytes(b"two")
    aged(path, 50)
    assert hashes.sha256(path) == hashlib.sha256(b"two").digest()
    path.write_bytes(b"three")
    os.utime(path, ns=(os.stat(path).st_atime_ns, aged(path, 50).stat().st_mtime_ns))
    assert hashes.sha256(path) == hashlib.sha256(b"three").digest()  # of another size


def test_a_file_that_was_changed_a_moment_ago_is_read_again(tmp_path, computed):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    then = path.stat().st_mtime_ns
    hashes.sha256(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(then, then))  # a clock too coarse to show it
    assert hashes.sha256(path) == hashlib.sha256(b"two").digest()


def test_another_file_of_the_same_size_and_time_is_another_file(tmp_path, computed):
    for name in ("a", "b"):
        aged((tmp_path / name).absolute()) if (tmp_path / name).write_bytes(name.encode()) else None
    assert hashes.sha256(tmp_path / "a") != hashes.sha256(tmp_path / "b")


@pytest.mark.parametrize("note", ["", "{}", '{"of": 1, "sha256": "zz"}', '{"of": null, "sha256": "00"}', "[]"])
def test_a_note_that_is_broken_is_made_again(tmp_path, computed, note):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    aged(path)
    hashes.sha256(path)
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    kept.write_text(note)
    assert hashes.sha256(path) == hashes.sha256(path) == hashlib.sha256(b"one").digest()
    assert computed == ["a", "a"]


def test_nowhere_to_keep_it_is_no_failure(tmp_path, computed, monkeypatch):
    (tmp_path / "a").write_bytes(b"one")
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "a"))
    assert hashes.sha256(aged(tmp_path / "a")) == hashlib.sha256(b"one").digest()


def test_the_weights_of_a_checkpoint_are_read_once_over_all_starts(tmp_path, tiny_model_dir, computed):
    for file in tiny_model_dir.iterdir():
        aged(file)
    assert find(str(tiny_model_dir)).weights == find(str(tiny_model_dir)).weights
    assert computed.count("model.safetensors") == 1
