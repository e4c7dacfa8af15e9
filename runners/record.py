"""The record of one cell: a folder named by what was run, with one line per sample, written as soon as it is done.

    results/<model>/<task>/<method>-b<budget>-<hash>/cell.json       what was run, and under which conditions
                                                     samples.jsonl   one JSON object per finished or failed sample

A killed run loses at most the line it was writing; the next run completes the file and goes on behind it.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from runners.logs import link_log

FORMAT = 1


def check_writable(results: Path) -> None:
    """Raises UserError unless files can be made in `results`, which is created if it is missing."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise _unwritable(results, error) from error


def digest(value: Any, length: int = 8) -> str:
    """The first hexadecimal digits of a hash of plain data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class Record:
    """What is on disk about one cell.

    identity: everything that names the cell, plain data with `model.name`, `task.name`, `method.name` and `budget`.
    """

    def __init__(self, results: Path, identity: dict[str, Any]):
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: tuples are lists
        method, budget = identity["method"]["name"], identity["budget"]
        name = f"{method}-b{budget:g}-{digest(self.identity)}"
        self.results = results
        self.folder = results / _plain(identity["model"]["name"]) / _plain(identity["task"]["name"]) / _plain(name)
        self.samples_path = self.folder / "samples.jsonl"
        self.cell_path = self.folder / "cell.json"

    @contextlib.contextmanager
    def lock(self, say_waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the cell: one process writes it at a time, a second one says so once and waits."""
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say_waiting()
                lock.acquire(poll_interval=0.2)
        except OSError as error:
            raise _unwritable(self.results, error) from error
        try:
            yield
        finally:
            lock.release()

    def read(self) -> dict[str, dict[str, Any]]:
        """The latest line of each sample, by its id. Raises UserError if the file was damaged by something else."""
        try:
            text = self.samples_path.read_bytes()
        except FileNotFoundError:
            return {}
        rows: dict[str, dict[str, Any]] = {}
        lines = text.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                rows[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break  # the line that a killed run was writing
                raise UserError(
                    f"{self.samples_path}, line {number}: not a sample's record; mend it or delete that line"
                ) from error
        return rows

    def runs(self) -> list[dict[str, Any]]:
        """Under which `conditions` samples were computed, oldest first; more than one only after resume=force."""
        try:
            return json.loads(self.cell_path.read_text())["runs"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.cell_path}: cannot be read; delete the folder {self.folder}") from error

    def check(self, conditions: dict[str, Any], force: bool) -> None:
        """Raises UserError if the record was made under other conditions, naming what differs, unless forced."""
        runs = self.runs()
        if not runs or force or conditions == runs[-1]["conditions"]:
            return
        differ = differences(runs[-1]["conditions"], conditions)
        raise UserError(
            f"{self.folder}: was begun under other conditions ({differ}); "
            "results=ANOTHER_FOLDER starts afresh, resume=force continues it and notes that it is mixed"
        )

    def begin(self, conditions: dict[str, Any], notes: dict[str, Any] | None = None) -> "Writer":
        """Get ready to append samples computed under `conditions`; the lock must be held.

        notes: written beside new conditions and never compared.
        """
        runs = self.runs()
        if not runs or conditions != runs[-1]["conditions"]:
            runs.append({"conditions": conditions, **(notes or {})})
        try:
            _replace(self.cell_path, {"format": FORMAT, "identity": self.identity, "runs": runs})
            link_log(self.folder)
            return Writer(self, run=len(runs) - 1)
        except OSError as error:
            raise _unwritable(self.results, error) from error


class Writer:
    """Appends samples to a record, each safe on disk before `append` returns."""

    def __init__(self, record: Record, run: int):
        self.record, self.run = record, run
        self.file = os.open(record.samples_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.refresh()

    def refresh(self) -> None:
        """Go on behind what another process has appended meanwhile; the lock must be held."""
        self.size = self._whole_lines()
        if self.size < os.fstat(self.file).st_size:
            os.ftruncate(self.file, self.size)

    def _whole_lines(self) -> int:
        """Bytes up to the end of the last whole line; a last line that only lacks its end is given one."""
        size = os.fstat(self.file).st_size
        if not size or os.pread(self.file, 1, size - 1) == b"\n":
            return size
        tail = self.record.samples_path.read_bytes().rpartition(b"\n")[2]
        try:
            json.loads(tail)
        except ValueError:
            return size - len(tail)
        os.write(self.file, b"\n")
        return size + 1

    def append(self, row: dict[str, Any]) -> None:
        """Add one sample. Raises UserError if the disk is full; what was there before stays whole."""
        line = json.dumps({**row, "run": self.run}, ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
        try:
            written = os.write(self.file, data)
            while written < len(data):
                written += os.write(self.file, data[written:])
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, self.size)
            raise UserError(
                f"results={self.record.results}: cannot write on ({error.strerror}); finished samples are kept in "
                f"{self.record.folder}, make room and run the same command again"
            ) from error
        self.size += len(data)

    def close(self) -> None:
        os.close(self.file)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two conditions, as `key was A, is B`."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)


def _plain(name: str) -> str:
    """A name that is safe as one folder."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip(".") or "_"


def _replace(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _unwritable(results: Path, error: OSError) -> UserError:
    what = error.strerror or str(error)
    where = f": {error.filename}" if error.filename else ""
    return UserError(f"results={results}: cannot be written ({what}{where}); give a folder that can")
