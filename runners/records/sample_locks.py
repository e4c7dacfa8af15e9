"""Which process computes which sample, so that several share one results folder: a claim ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from methods.core.errors import UserError


class Claims:
    """Claims on samples by their ids, seen by every process that opens the same folder.

    A claim locks one byte of an empty file, at a place that the id gives. The system gives it back when the process
    ends, however it ends. Two ids that share a place wait for each other, which costs time and nothing else.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            problem = f"results={folder}: cannot be written ({error.strerror}); give a folder that can"
            raise UserError(problem) from error

    @contextlib.contextmanager
    def claim(self, ids: Sequence[str], wait: bool = False) -> Iterator[bool]:
        """Hold these samples inside the block; False, holding nothing, if another process has one of them.

        wait: until nobody else has any.
        """
        # in one order, so that nobody waits in a ring
        places = sorted({zlib.crc32(id.encode()) for id in ids})
        got = self._lock(places, wait)
        try:
            yield got
        finally:
            if got:
                self._unlock(places)

    def _lock(self, places: Sequence[int], wait: bool) -> bool:
        for i, place in enumerate(places):
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except (BlockingIOError, PermissionError):
                self._unlock(places[:i])
                return False
        return True

    def _unlock(self, places: Sequence[int]) -> None:
        for place in places:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        os.close(self.file)
