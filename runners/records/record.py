"""The record of one cell: a folder named by what was run, with one line per sample, written as soon as it is done.

    results/<model>/<task>/<method>-b<budget>-<hash>/cell.json       what was run, and under which conditions
                                                     samples.jsonl   one JSON object per finished or failed sample

A killed run loses at most the line it was writing; the next run completes the file and goes on behind it.
docs/records.md says what is in a record, and what has a record of its own.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from analysis import records
from methods.core.errors import UserError
from runners.records.job_log import link_log
from runners.records.stored import read_samples

FORMAT = 2
#: conditions that make a generation: where they differ, what was asked for has another record
GENERATION = ("code", "weights", "files", "artefacts")


def check_writable(folder: Path, key: str = "results") -> None:
    """Raises UserError unless files can be made in a folder, which is created if it is missing; key: of its setting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error, key) from error


def digest(value: Any, length: int = 8) -> str:
    """The first hexadecimal digits of a hash of plain data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class Record:
    """What is on disk about one cell.

    identity: everything that was asked for, plain data with `model.name`, `task.name`, `method.name` and `budget`.
    generation: by which code and files it is answered.  folder: of a record that is there already.
    """

    def __init__(
        self,
        results: Path,
        identity: dict[str, Any],
        generation: dict[str, Any] | None = None,
        folder: Path | None = None,
    ):
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: tuples are lists
        self.results = results
        self.folder = folder or self._folder(generation or {})
        self.samples_path = self.folder / "samples.jsonl"
        self.cell_path = self.folder / "cell.json"

    def _folder(self, generation: dict[str, Any]) -> Path:
        identity = self.identity
        name = f"{identity['method']['name']}-b{identity['budget']:g}-{digest([identity, generation])}"
        return (
            self.results
            / plain_name(identity["model"]["name"])
            / plain_name(identity["task"]["name"])
            / plain_name(name)
        )

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
        """The latest line of each sample, by its key. Raises UserError if the file was damaged by something else."""
        if not (self.samples_path.exists() or self.samples_path.is_symlink()):
            return {}
        return {key_of(row): row for row in read_samples(self.samples_path)}

    def runs(self) -> list[dict[str, Any]]:
        """Under which `conditions` samples were computed, oldest first; more than one only after resume=force.

        None where cell.json is missing or broken: `begin` writes it again.
        """
        try:
            book = records.parse(self.cell_path.read_bytes())
            records.check_fields(book, {"runs": records.RUNS})
        except (FileNotFoundError, ValueError):
            return []
        except OSError as error:
            raise unreadable(self.cell_path, error) from error
        runs: list[dict[str, Any]] = book["runs"]
        return runs

    def check_conditions(self, conditions: dict[str, Any], force: bool) -> None:
        """Raises UserError if samples were finished under other conditions, naming what differs, unless forced."""
        runs = self.runs()
        if not runs or force or conditions == runs[-1]["conditions"]:
            return
        if all("error" in row for row in self.read().values()):
            return  # nothing that could be mixed
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
            began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            runs.append({"conditions": conditions, "began": began, **(notes or {})})
        try:
            # the lock is held: these were left by a process that was killed
            for draft in self.folder.glob(f".{self.cell_path.name}.*"):
                draft.unlink(missing_ok=True)
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
            records.parse(tail)
        except ValueError:
            return size - len(tail)
        os.write(self.file, b"\n")
        return size + 1

    def append(self, row: dict[str, Any]) -> None:
        """Add one sample. Raises UserError if the disk is full, and what was there before stays whole; or if the file
        was deleted, since nobody would find what is written to it.
        """
        if not self._is_there():
            raise gone(self.record)
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

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.record.samples_path), os.fstat(self.file))
        except OSError:
            return False

    def close(self) -> None:
        """Close the file; what was appended is on disk."""
        os.close(self.file)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two conditions, as `key was A, is B`."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)


def key_of(row: dict[str, Any]) -> str:
    """What a sample is found by: its key; in a record of format 1 its id."""
    return row["key"] if "key" in row else row["id"]


def asked(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a record's identity was asked for; one of format 1 also says by which weights it was answered."""
    model = {key: value for key, value in identity["model"].items() if key != "weights"}
    return {**identity, "model": model}


def generation_of(identity: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """By which code and files a run of a record answered."""
    weights = {"weights": identity["model"]["weights"]} if "weights" in identity["model"] else {}
    return {**weights, **{key: value for key, value in run["conditions"].items() if key in GENERATION}}


def plain_name(name: str) -> str:
    """A name that is safe as one folder."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip(".") or "_"


def _replace(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def gone(record: Record) -> UserError:
    """What is said of a record whose samples were deleted while they were being written."""
    return UserError(
        f"{record.folder}: its samples were deleted or cut while this run was writing them; the same command computes "
        "them again"
    )


def unreadable(path: Path, error: OSError) -> UserError:
    """What is said of a file that cannot be read, naming it."""
    return UserError(f"{path}: cannot be read ({error.strerror or error}); make it a file that can")


def _unwritable(folder: Path, error: OSError, key: str = "results") -> UserError:
    what = error.strerror or str(error)
    where = f": {error.filename}" if error.filename else ""
    return UserError(f"{key}={folder}: cannot be written ({what}{where}); give a folder that can")
