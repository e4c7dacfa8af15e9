"""One sample beside the full cache: its answer's token ids, and how far the two caches' predictions are apart.

Standard library only. What is read of a sample's line: `ids`, `stop` and `blank` of an answer, and `forced`, what was
found where the method read the full cache's own answer (docs/numbers.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_PERIOD = 128  # tokens of the longest loop that is looked for
TURNS = 3  # times that a loop goes round at least
SHORTEST_LOOP = 24  # tokens that it takes at least
EARLY = 0.5  # of the full cache's tokens; what ends by itself with fewer has ended early
LONG_ENOUGH = 8  # tokens of a full cache's answer for that


@dataclass(frozen=True)
class Answer:
    """What one cache answered.

    ids: tokens, with the end token where it ended by one.  stop: "end", "string" or "length".
    blank: whether its text is nothing, or nothing but white space.
    """

    ids: tuple[int, ...]
    stop: str
    blank: bool = False

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens without the end token."""
        return self.ids[:-1] if self.stop == "end" else self.ids

    @property
    def is_cut(self) -> bool:
        """Whether it ran to its limit."""
        return self.stop == "length"


@dataclass(frozen=True)
class Forced:
    """Both caches on the full cache's own answer, place by place; place 0 predicts its first token.

    kl: KL(full || method) in nats, None where it is not finite.  differ: places whose likeliest token is another one.
    clear: those of them where the full cache's two likeliest are 0.1 nats apart or more.
    counted: the first place whose query attended to the compressed cache.
    dnll: mean of ln p(y) - ln q(y) over the counted places; None where there is none.
    flip: the first place where another token than the full cache's answer has is the method's likeliest.
    drawn: the full cache's answer was drawn at random.
    """

    kl: tuple[float | None, ...]
    differ: tuple[int, ...]
    clear: tuple[int, ...]
    counted: int
    dnll: float | None = None
    flip: int | None = None
    drawn: bool = False

    @property
    def counts(self) -> tuple[float | None, ...]:
        """KL of the places that count."""
        return self.kl[self.counted :]

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        return None not in self.kl

    @property
    def mean(self) -> float:
        """Mean KL of the counted places, which there must be, all finite."""
        values = [one for one in self.counts if one is not None]
        return sum(values) / len(values)

    @property
    def largest(self) -> tuple[float, int]:
        """The largest KL of a counted place, and its place."""
        value, place = max((one, -i) for i, one in enumerate(self.kl) if i >= self.counted and one is not None)
        return value, -place

    def share(self, places: Sequence[int]) -> float:
        """The share of the counted places that are among these."""
        return sum(place >= self.counted for place in places) / len(self.counts)


def answer_of(row: Mapping[str, Any]) -> Answer | None:
    """The answer in a sample's line, the first of several; None where nothing was generated or no ids were kept."""
    one = (row.get("turns") or [row])[0]
    if not isinstance(one.get("ids"), list) or "stop" not in one:
        return None
    return Answer(tuple(one["ids"]), one["stop"], bool(one.get("blank", False)))


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `answer_of` and `forced_of` read of a sample's line, without the rest; empty where there is nothing."""
    if answer_of(row) is None:
        return {}
    one = (row.get("turns") or [row])[0]
    kept = {name: one[name] for name in ("ids", "stop", "blank") if name in one}
    return {**kept, **({"forced": row["forced"]} if "forced" in row else {})}


def forced_of(row: Mapping[str, Any]) -> Forced | None:
    """What a sample's line has of the forced pass; None where there was none."""
    found = row.get("forced")
    if found is None or "error" in found:
        return None
    places: dict[str, Any] = {name: tuple(found[name]) for name in ("kl", "differ", "clear")}
    own = {name: found[name] for name in ("counted", "dnll", "flip", "drawn") if name in found}
    return Forced(**places, **own)


def first_divergence(full: Sequence[int], ours: Sequence[int]) -> int | None:
    """The index of the first token that differs; None for the same answer."""
    if tuple(full) == tuple(ours):
        return None
    same = (a == b for a, b in zip(full, ours))
    return next((i for i, one in enumerate(same) if not one), min(len(full), len(ours)))


def shared_prefix(full: Sequence[int], ours: Sequence[int]) -> float:
    """The share of the full cache's answer that the other one begins with."""
    at = first_divergence(full, ours)
    return 1.0 if at is None else at / len(full)


def is_early(ours: Answer, full: Answer) -> bool:
    """Whether an answer ended by itself with fewer than half of the tokens of a full answer that ended by itself."""
    if ours.is_cut or full.is_cut or len(full.text_ids) < LONG_ENOUGH:
        return False
    return len(ours.text_ids) < EARLY * len(full.text_ids)


def is_runaway(ours: Answer, full: Answer) -> bool:
    """Whether an answer ran to its limit where the full cache's ended by itself."""
    return ours.is_cut and not full.is_cut


def repetition(ids: Sequence[int]) -> float:
    """1 less the share of different runs of four tokens among all; 0 for fewer than four tokens."""
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loop(ids: Sequence[int]) -> int | None:
    """The smallest period in which an answer's end goes round, tokens; None where it does not."""
    for period in range(1, LONGEST_PERIOD + 1):
        n = max(TURNS * period, SHORTEST_LOOP)
        if n > len(ids):
            return None
        # most periods end here, before anything is copied
        if ids[-1] == ids[-1 - period] and ids[len(ids) - n + period :] == ids[len(ids) - n : -period]:
            return period
    return None
