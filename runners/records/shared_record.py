"""A record that several processes may add to: what is done is read on, and no sample is written twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from analysis.records import SHOWN, parse_sample
from runners.records.record import Record, Writer, gone, key_of, unreadable


class SharedRecord:
    """One cell's record; the lock is taken and the file opened for each batch of rows, not for the whole time.

    conditions, notes, force: as in `Record.begin` and `Record.check`.
    """

    def __init__(self, record: Record, conditions: dict[str, Any], notes: dict[str, Any], force: bool = False):
        self.record, self.conditions, self.notes, self.force = record, conditions, notes, force
        self.rows: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes of whole lines read so far
        self._run: int | None = None  # of the rows that are added; None: nothing was added yet

    def refresh(self) -> None:
        """Read what has been added since. Raises UserError if the file was damaged by something else."""
        try:
            size = self.record.samples_path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError as error:
            raise unreadable(self.record.samples_path, error) from error
        if size < self._read:  # only whole lines were read, which nobody cuts
            raise gone(self.record)
        if size == self._read:
            return
        try:
            with self.record.samples_path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError as error:
            raise unreadable(self.record.samples_path, error) from error
        whole = new[: new.rfind(b"\n") + 1]
        try:
            for line in whole.split(b"\n"):
                if line:
                    row = parse_sample(line, SHOWN)
                    self.rows[key_of(row)] = row
        except ValueError:
            self.rows = self.record.read()  # names the line
        self._read += len(whole)

    @property
    def finished(self) -> set[str]:
        """Keys of samples that have an answer; failed ones are tried again."""
        return {key for key, row in self.rows.items() if "error" not in row}

    def check_conditions(self) -> None:
        """Raises UserError if the record was made under other conditions."""
        self.record.check_conditions(self.conditions, self.force)

    def add(self, rows: Iterable[dict[str, Any]], say_waiting: Callable[[], None]) -> int:
        """Append those rows that nobody has added meanwhile, each safe on disk; returns how many.

        A failure is not written again where the record already ends with the same one. Raises UserError if the disk is
        full or the record was made under other conditions.
        """
        added = 0
        with self.record.lock(say_waiting):
            self.refresh()
            if self._run is None:
                self.check_conditions()
            with self._writer() as writer:
                self._run = writer.run
                self.refresh()
                for row in rows:
                    before = self.rows.get(key_of(row))
                    if before is not None and ("error" not in before or before["error"] == row.get("error")):
                        continue
                    writer.append(row)
                    added += 1
            self.refresh()
        return added

    def _writer(self) -> Writer:
        """For rows of this call; the lock must be held."""
        if self._run is None:
            return self.record.begin(self.conditions, self.notes)
        return Writer(self.record, self._run)
