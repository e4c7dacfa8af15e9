"""What a record must hold to be read: the fields of cell.json and of a sample's line, for all that read records."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


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
    "family?": TEXT, "simulated?": FLAG, "place?": TEXT, "began?": TEXT, "mean_over?": TEXT, "commit?": TEXT_OR_NULL,
    "command?": TEXT, "conditions.weights?": TEXT, "conditions.files?": TEXT, "conditions.code?": TEXT,
}  # fmt: skip
SAMPLE = {
    "id": TEXT, "key?": TEXT, "tags?": OBJECT, "tags.subset?": TEXT, "tags.category?": TEXT, "tags.control?": FLAG,
    "tags.chance?": NUMBER, "prompt_end?": TEXT, "answers?": LIST, "run?": COUNT,
}  # fmt: skip
FAILED = SAMPLE | {"error": TEXT}
SCORED = SAMPLE | {"score": SCORE}
FINISHED = SCORED | {
    "weights?": WEIGHTS, "parts?": SCORES, "measure?": TEXT, "turns?": TURNS, "curve?": CURVE,
    "tokens_in": COUNT, "tokens_out": COUNT, "batch": SOME,
    **{f"ledger.{name}": AMOUNT for name in ("full", "full_prompt", "held_prompt", "held_end", "read_step",
                                             "peak_prompt", "peak_decode")},
    **{f"ledger.{name}?": AMOUNT for name in ("padding", "padding_end", "workspace", "adapter", "host", "asked",
                                              "overhead")},
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


def parse(text: str | bytes) -> Any:
    """What JSON holds. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check(book: Any, fields: Mapping[str, Kind]) -> None:
    """Raises ValueError that names the first field that is missing or no such thing as it has to be."""
    if not isinstance(book, dict):
        raise ValueError(f"an object is needed, found {_shown(book)}")
    for name, kind in fields.items():
        _field(book, name, kind)


def check_sample(row: Any, fields: Mapping[str, Kind]) -> None:
    """As `check`, for the line of a sample, which may have failed; fields: of one that has not."""
    check(row, FAILED if isinstance(row, dict) and "error" in row else fields)
    if "times" in row and "error" not in row:
        check(row, {f"{kind}.{name}": SECONDS for kind in ("times", "full_times") if kind in row for name in ROUNDS})
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
