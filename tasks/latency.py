"""Time and bytes, over lengths and batches: what a method costs and saves beside the full cache.

Here:   prompts are random tokens, since times hardly depend on what a text says; neither a tokenizer nor trained
        weights are needed. The score is the time of a decoded token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from methods.core.errors import UserError
from tasks.base import Apart, Example, Timed
from tasks.grid import as_list
from tasks.table import Metric

VERSION = "1"  # goes into every record; raise it when a time could change


@dataclass
class Latency(Apart):
    """A grid of prompt lengths and batch sizes.

    lengths: tokens of every row's prompt.  batches: rows that run together.
    new_tokens: decoded by each row.
    rounds: repeats of every point; each reads and decodes with the method and with the full cache, in turns.
    data_seed: of the tokens.
    """

    lengths: Sequence[int] | int = (512, 1024, 2048, 3584)
    batches: Sequence[int] | int = (1, 4)
    new_tokens: int = 32
    rounds: int = 5
    data_seed: int = 42

    metric: ClassVar[Metric] = Metric("decode time", "milliseconds per token", "lower", scale=1, digits=2)
    mean_over: ClassVar[Literal["categories", "subsets"]] = "subsets"

    def __post_init__(self) -> None:
        for key, least in (("lengths", 2), ("batches", 1)):
            values = as_list(getattr(self, key))
            if not values or any(type(value) is not int or value < least for value in values):
                raise UserError(
                    f"latency: task.{key}={getattr(self, key)}; give whole numbers of {least} or more, such as [1024]"
                )
            setattr(self, key, sorted(set(values)))
        for key in ("new_tokens", "rounds"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise UserError(f"latency: task.{key}={value}; give a whole number, 1 or more")

    @property
    def name(self) -> str:
        return "latency"

    def source(self) -> str:
        lengths, batches = (", ".join(map(str, as_list(values))) for values in (self.lengths, self.batches))
        return (
            f"latency (random tokens, seed {self.data_seed}), prompts of {lengths} tokens x batches of {batches}, "
            f"{self.new_tokens} new tokens, {self.rounds} rounds in turns with the full cache"
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in ("new_tokens", "rounds", "data_seed")}
        return {"task": self.name, "timing": VERSION, **settings}

    def examples(self) -> list[Example]:
        return [self._example(length, batch) for batch in as_list(self.batches) for length in as_list(self.lengths)]

    def score(self, example: Example, prediction: str) -> float:
        raise NotImplementedError("latency has no predictions: the time of a decoded token is the score")

    def _example(self, length: int, batch: int) -> Example:
        point = f"{length}x{batch}"
        return Example(
            id=point,
            context="",
            question="",
            answers=[],
            max_new_tokens=self.new_tokens,
            tags={"subset": point, "category": f"batch {batch}", "length": length, "batch": batch},
            timed=Timed(length, batch, self.new_tokens, self.rounds, self.data_seed),
        )
