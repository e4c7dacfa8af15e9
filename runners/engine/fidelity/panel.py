"""Which samples of a run have a forced half, and how much of its time that takes."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.base import Example

TOKENS = 32  # of a full cache's answer that are forced
MOST, LEAST = 50, 20  # samples of a cell: more cost too much, fewer earn no label
PART = 4  # one sample in so many, between the two
KINDS = ("answer", "turns")


class Panel:
    """The forced half of a run: its bounds, and the time it has taken.

    Which samples have one depends on their content and number alone, not on the clock, their order, batch or group: a
    quarter of them, at least LEAST and at most MOST. In a group a sample costs no more than its own decoding, up to
    TOKENS steps of it. Of a cache that reads its prompts alone it costs another pass over the prompt: there it is a
    quarter of the samples, however few these are.

    how: "auto" within the bounds, "full" all samples and tokens, "off" nothing.  examples: of the run.
    """

    def __init__(self, how: str, examples: Sequence[Example]):
        self.most = None if how == "full" else TOKENS
        able = [one.key for one in examples if one.kind in KINDS and one.beams == 1 and not one.error]
        in_turn = sorted(able, key=lambda key: (zlib.crc32(key.encode()), key))
        few = min(MOST, -(-len(able) // PART))
        counts = {"full": (len(able), len(able)), "off": (0, 0)}.get(how, (max(LEAST, few), few))
        self.chosen, self.chosen_alone = (frozenset(in_turn[:n]) for n in counts)
        self.seconds = 0.0
        #: mean KL of the full cache against itself in a batch of another size, once it is known: where the numbers of
        #: the model are no float32, what is below that says nothing
        self.noise: float | None = None
        self.began: float | None = None  # when the first sample did

    def wants(self, batch: Sequence[Example], alone: bool = False) -> list[bool]:
        """Which examples of a batch have a forced half; alone: of a cache that can share no prompt."""
        return [one.key in (self.chosen_alone if alone else self.chosen) for one in batch]

    @property
    def share(self) -> float:
        """The part of the time since the first sample that went into it."""
        spent = 0.0 if self.began is None else time.perf_counter() - self.began
        return self.seconds / spent if spent else 0.0

    def begin(self) -> None:
        """A sample is begun: time is counted from the first one on."""
        self.began = time.perf_counter() if self.began is None else self.began

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What is done inside the block is its own."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
