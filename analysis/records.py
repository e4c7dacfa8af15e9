"""The one reader of records: which fields cell.json and a sample's line hold, and both files as they are read.

Standard library only, for runs and analyses alike. What cannot be read is one line that says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

#: protocols as records have them, and the words for them on screen
PROTOCOLS = {"aware": "query_aware", "agnostic": "query_agnostic"}


class Unreadable(ValueError):
    """A file of a record cannot be read; the message, one line, names the file and what is wrong with it."""


class Kind(NamedTuple):
    """what: as a message calls it.  fits: whether a value is one."""

    what: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # false for NaN


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _all(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


def _has_conditions(run: Any) -> bool:
    return isinstance(run, dict) and isinstance(run.get("conditions"), dict)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and SCORE.fits(turn.get("score")) and all(is_number(turn.get(k)) for k in TURN)


TURN = ("held", "full")  # bytes after it
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXT_OR_NULL = Kind("text or null", lambda value: value is None or isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
NUMBER = Kind("a finite number", is_number)
NUMBER_OR_NULL = Kind("a finite number or null", lambda value: value is None or is_number(value))
AMOUNT = Kind("a number, 0 or more", lambda value: is_number(value) and value >= 0)
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
SOME = Kind("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1)
DIGITS = Kind("a whole number from 0 to 15", lambda value: _is_whole(value) and 0 <= value <= 15)
SCORE = Kind("a finite score", lambda value: isinstance(value, bool) or is_number(value))
SCORES = Kind(
    "an object of finite scores", lambda value: isinstance(value, dict) and all(map(SCORE.fits, value.values()))
)
WEIGHTS = Kind(
    "an object of numbers above 0",
    lambda value: isinstance(value, dict) and all(is_number(one) and one > 0 for one in value.values()),
)
BETTER = Kind("higher or lower", lambda value: value in ("higher", "lower"))
AMOUNTS = Kind("a list of numbers, 0 or more", _all(AMOUNT.fits))
SECONDS = Kind("a list of numbers above 0", _all(lambda value: is_number(value) and value > 0, least=1))
RUNS = Kind("a list of objects with conditions", _all(_has_conditions, least=1))
NUMBERS = Kind("a list of numbers", _all(is_number))
CURVE = Kind("a list of three numbers each", _all(lambda bin: NUMBERS.fits(bin) and len(bin) == 3))
IDS = Kind("a list of whole numbers, 0 or more", _all(COUNT.fits))
PLACES = Kind("a list of numbers or null", _all(lambda value: value is None or is_number(value)))
WHOLE_OR_NULL = Kind("a whole number or null", lambda value: value is None or _is_whole(value))
TURNS = Kind("a list of objects with score, held and full", _all(_is_turn, least=1))

#: names of fields; a question mark ends the name of one that may be missing
IDENTITY = {
    "identity.model.name": TEXT, "identity.task.name": TEXT, "identity.method.name": TEXT, "identity.budget": AMOUNT,
    "identity.protocol": TEXT, "identity.dtype": TEXT,
}  # fmt: skip
CELL = IDENTITY | {
    "format": WHOLE, "identity.model.weights?": TEXT, "identity.method.config": OBJECT, "identity.seed": WHOLE,
    "identity.task.fingerprint?": OBJECT, "identity.task.data?": TEXT, "identity.task.metric?": OBJECT,
    "identity.task.metric.name?": TEXT, "identity.task.metric.unit?": TEXT, "identity.task.metric.better?": BETTER,
    "identity.task.metric.scale?": NUMBER, "identity.task.metric.digits?": DIGITS, "identity.passes?": OBJECT,
    "runs": RUNS,
}  # fmt: skip
RUN = {
    "family?": TEXT, "binds?": TEXT, "simulated?": FLAG, "place?": TEXT, "began?": TEXT, "mean_over?": TEXT,
    "commit?": TEXT_OR_NULL, "command?": TEXT, "conditions.weights?": TEXT, "conditions.files?": TEXT,
    "conditions.code?": TEXT,
}  # fmt: skip
SAMPLE = {
    "id": TEXT, "key?": TEXT, "tags?": OBJECT, "tags.subset?": TEXT, "tags.category?": TEXT, "tags.control?": FLAG,
    "tags.chance?": NUMBER, "prompt_end?": TEXT, "answers?": LIST, "run?": COUNT,
}  # fmt: skip
FAILED = SAMPLE | {"error": TEXT}
SCORED = SAMPLE | {"score": SCORE}
#: what a method predicts on the full cache's own answer, or why that is not known
FORCED = {
    "kl": PLACES, "differ": IDS, "clear": IDS, "counted": COUNT, "dnll": NUMBER_OR_NULL, "flip": WHOLE_OR_NULL,
    "drawn?": FLAG,
}  # fmt: skip
BLANK = {"error": TEXT}
FINISHED = SCORED | {
    "ids?": IDS, "stop?": TEXT, "blank?": FLAG, "forced?": OBJECT,
    "weights?": WEIGHTS, "parts?": SCORES, "measure?": TEXT, "turns?": TURNS, "repeats?": TURNS, "curve?": CURVE,
    "tokens_in": COUNT, "tokens_out": COUNT, "batch": SOME,
    **{f"ledger.{name}": AMOUNT for name in ("full", "full_prompt", "held_prompt", "held_end", "read_step",
                                             "peak_prompt", "peak_decode")},
    **{f"ledger.{name}?": AMOUNT for name in ("padding", "padding_end", "workspace", "adapter", "host", "asked",
                                              "overhead", "full_read", "read_turn", "moved_step", "moved_turn")},
    "ledger.binds?": TEXT,
    "ledger.per_layer?": AMOUNTS, "ledger.nominal_bits?": NUMBER_OR_NULL, "ledger.effective_bits?": NUMBER_OR_NULL,
    "timings.prompt": AMOUNT, "timings.decode": AMOUNT, "timings.n_prompt": COUNT, "timings.steps": COUNT,
}  # fmt: skip
#: what the tables of a run show besides
SHOWN = FINISHED | {"cut": FLAG, "threads": SOME}
#: a sample of task=latency
TIMED = SAMPLE | {
    "times.prompts": SECONDS, "times.steps": SECONDS, "full_times.prompts?": SECONDS, "full_times.steps?": SECONDS,
    "tokens_in": SOME, "batch": SOME, "threads": SOME, "ledger.padding?": AMOUNT,
    **{f"ledger.{name}": AMOUNT for name in ("full_prompt", "held_prompt", "read_step", "peak_prompt", "peak_decode")},
}  # fmt: skip
ROUNDS = ("prompts", "steps")


#: parts that are the sample's own score without being the first, where its line names none, as lines did before
NOT_FIRST = ("ROUGE-L", "flexible")
#: of a ledger, what is no number of bytes that rows share
NOT_SHARED = ("n_layers", "share", "nominal_bits", "effective_bits", "binds")


class Line(NamedTuple):
    """A line of samples.jsonl. number: of the line, from 1.  at, size: its place in the file, bytes.

    row: the sample; empty where `wrong` says why there is none.  torn: of a last line without an end, which a killed
    run was writing.
    """

    number: int
    at: int
    size: int
    row: dict[str, Any]
    wrong: str = ""
    torn: bool = False


def read_cell(folder: Path, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """A record's cell.json with fields of this module. Raises Unreadable."""
    path = folder / "cell.json"
    try:
        book = parse(path.read_bytes())
        check_fields(book, fields)
    except OSError as error:
        raise Unreadable(f"{path}: not a record that can be read ({error.strerror})") from error
    except ValueError as error:
        raise Unreadable(f"{path}: not a record that can be read ({error})") from error
    cell: dict[str, Any] = book
    return cell


def lines(path: Path, fields: Mapping[str, Kind]) -> Iterator[Line]:
    """Every line of a samples.jsonl that is not empty; fields: as in `parse_sample`. Raises Unreadable."""
    at = 0
    every = _bytes(path).split(b"\n")
    for number, line in enumerate(every, 1):
        if line:
            where = number, at, len(line)
            try:
                yield Line(*where, parse_sample(line, fields))
            except ValueError as error:
                yield Line(*where, {}, str(error), number == len(every) and not _is_json(line))
        at += len(line) + 1


def read_samples(path: Path, fields: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
    """The samples of a samples.jsonl in order, without the half of a line that a killed run was writing.

    fields: as in `parse_sample`.  Raises Unreadable that names the line.
    """
    for line in lines(path, fields):
        if line.wrong and not line.torn:
            raise Unreadable(
                f"{path}, line {line.number}: not a sample's record ({line.wrong}); mend it or delete that line"
            )
        if not line.wrong:
            yield line.row


def parse_sample(line: str | bytes, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """A sample's line, with a ledger of its own; fields: of one that has not failed. Raises ValueError."""
    row = parse(line)
    check_sample(row, fields)
    try:
        return of_sample(row)
    except TypeError as error:
        raise ValueError(f"its ledger holds what is no number ({error})") from error


def of_sample(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a ledger of its own: records used to hold the whole batch's, of which each row has an equal part.

    Only a ledger by row knows what padding held.
    """
    book, batch = row.get("ledger"), row.get("batch", 1)
    if not isinstance(book, dict) or "padding" in book or batch == 1:
        return row
    ledger = {
        name: value if name in NOT_SHARED or value is None
        else [n / batch for n in value] if isinstance(value, list) else value / batch
        for name, value in book.items()
    }  # fmt: skip
    return {**row, "ledger": ledger}


def above(row: Mapping[str, Any]) -> bool:
    """Whether a sample held, or its steps read, more than its budget and what the method documents on top."""
    book = row["ledger"]
    if book.get("binds") == "read":
        return bool(book.get("full_read", 0) and book["read_step"] > book.get("asked", book["read_step"]))
    return book["held_prompt"] > book.get("asked", book["held_prompt"]) + book.get("overhead", 0)


def measure(row: Mapping[str, Any]) -> str:
    """Which of several scores is the sample's own. Turns and places in a text are no measures."""
    parts = row.get("parts") or {}
    if "turns" in row or "curve" in row:
        return ""
    if "measure" in row:
        return str(row["measure"])
    return next((name for name in NOT_FIRST if name in parts), next(iter(parts), ""))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror})") from error


def _is_json(line: bytes) -> bool:
    try:
        parse(line)
    except ValueError:
        return False
    return True


def parse(text: str | bytes) -> Any:
    """What JSON holds. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_fields(book: Any, fields: Mapping[str, Kind]) -> None:
    """Raises ValueError that names the first field that is missing or no such thing as it has to be."""
    if not isinstance(book, dict):
        raise ValueError(f"an object is needed, found {_shown(book)}")
    for name, kind in fields.items():
        _field(book, name, kind)


def check_sample(row: Any, fields: Mapping[str, Kind]) -> None:
    """As `check_fields`, for the line of a sample, which may have failed; fields: of one that has not."""
    check_fields(row, FAILED if isinstance(row, dict) and "error" in row else fields)
    if isinstance(forced := row.get("forced"), dict) and "error" not in row:
        check_fields(
            row, {f"forced.{name}": kind for name, kind in (FORCED if "error" not in forced else BLANK).items()}
        )
    if "times" in row and "error" not in row:
        check_fields(
            row, {f"{kind}.{name}": SECONDS for kind in ("times", "full_times") if kind in row for name in ROUNDS}
        )
        for name in ROUNDS:
            if "full_times" in row and len(row["times"][name]) != len(row["full_times"][name]):
                raise ValueError(f"times.{name} and full_times.{name} are of different rounds")


def _field(book: dict[str, Any], name: str, kind: Kind) -> None:
    value: Any = book
    parts = name.removesuffix("?").split(".")
    for depth, part in enumerate(parts):
        if not isinstance(value, dict):
            raise ValueError(f"{'.'.join(parts[:depth])}={_shown(value)}: {OBJECT.what} is needed")
        if part not in value:
            if name.endswith("?"):
                return
            raise ValueError(f"{'.'.join(parts[: depth + 1])} is missing")
        value = value[part]
    if not kind.fits(value):
        raise ValueError(f"{'.'.join(parts)}={_shown(value)}: {kind.what} is needed")


def _shown(value: Any) -> str:
    """A value in a few characters of one line."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    if isinstance(value, int) and not isinstance(value, bool) and not _is_whole(value):
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
