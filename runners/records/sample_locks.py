"""Which process computes which sample, so that several share one results folder: a lock ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from methods.core.errors import UserError


class SampleLocks:
    """Locks on samples by their ids, seen by every process that opens the same folder.

    A sample's lock is one byte of an empty file, at an offset that the id gives. The system frees it when the process
    ends, however it ends. Two ids that share an offset wait for each other, which costs time and nothing else.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            problem = f"results={folder}: cannot be written ({error.strerror}); give a folder that can"
            raise UserError(problem) from error

    @contextlib.contextmanager
    def hold(self, ids: Sequence[str], wait: bool = False) -> Iterator[bool]:
        """Hold these samples inside the block; False, holding nothing, if another process has one of them.

        wait: until nobody else has any.
        """
        # sorted, so that two processes that each hold what the other needs cannot deadlock
        offsets = sorted({zlib.crc32(id.encode()) for id in ids})
        got = self._lock(offsets, wait)
        try:
            yield got
        finally:
            if got:
                self._unlock(offsets)

    def _lock(self, offsets: Sequence[int], wait: bool) -> bool:
        for i, offset in enumerate(offsets):
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, offset)
            except (BlockingIOError, PermissionError):
                self._unlock(offsets[:i])
                return False
        return True

    def _unlock(self, offsets: Sequence[int]) -> None:
        for offset in offsets:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, offset)

    def close(self) -> None:
        """Close the file; the system frees what this process still holds."""
        os.close(self.file)
