"""Which samples of a run have a forced half, and how much of its time that may take."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.base import Example

TOKENS = 32  # of a full cache's answer that are forced
SAMPLES = 50  # of a cell
SHARE = 0.25  # of a run's time


class Panel:
    """The forced half of a run: its bounds, and the time it has taken.

    Which samples it is made of depends on their content alone, and what it finds of one on nothing but that sample; a
    run that has spent too much of its time on it leaves further samples out, for all caches of a group alike.

    how: "auto" within the bounds, "full" all samples and tokens, "off" nothing.  examples: of the run.
    """

    def __init__(self, how: str, examples: Sequence[Example]):
        self.how = how
        self.most = None if how == "full" else TOKENS
        able = [one.key for one in examples if one.kind in ("answer", "turns") and one.beams == 1]
        in_turn = sorted(able, key=lambda key: (zlib.crc32(key.encode()), key))
        self.chosen = frozenset({"full": able, "off": []}.get(how, in_turn[:SAMPLES]))
        self.seconds = 0.0
        self.began: float | None = None  # when the first sample did
        self.left_out = 0  # samples, for want of time

    def wants(self, batch: Sequence[Example]) -> list[bool]:
        """Which examples of a batch are to have a forced half."""
        return [one.key in self.chosen for one in batch]

    def has_time_for(self, batch: Sequence[Example]) -> bool:
        """Whether a batch that begins now has a forced half."""
        return any(self.wants(batch)) and (self.how != "auto" or self.share <= SHARE)

    def now(self, batch: Sequence[Example]) -> list[bool] | None:
        """As `wants`, for a batch that begins; None where it has no forced half, or there is no time for it."""
        self.began = time.perf_counter() if self.began is None else self.began
        wanted = self.wants(batch)
        if self.has_time_for(batch):
            return wanted
        self.left_out += sum(wanted)
        return None

    @property
    def share(self) -> float:
        """The part of the time since the first sample that went into it."""
        spent = 0.0 if self.began is None else time.perf_counter() - self.began
        return self.seconds / spent if spent else 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What is done inside the block is its own."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
