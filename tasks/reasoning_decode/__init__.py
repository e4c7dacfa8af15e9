"""Short prompts and long answers, which a method compresses while they are written: three generators.

Source: Mao et al. 2026, TriAttention (its DFS state task), whose graphs, steps and grading are followed; the passcode
        of Random Attention, arXiv:2609.03430, as far as its summary tells.
Here:   prompts in our own words. Every item has a random source of its own, (data_seed, index), so the graphs are not
        the released ones. The answer's object is the last one behind the last "Answer:"; the released grader, which
        takes the first of the whole text, is a line below the table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar, Literal

from methods.core.errors import UserError
from tasks import grid
from tasks.base import Example, Task
from tasks.data.files import chosen
from tasks.reasoning_decode import chain, graphs, passcode
from tasks.table import Mean, mean_by_category
from tasks.tokens import Tokens

VERSION = "1"  # goes into every record; raise it when a score could change
KINDS = ("dfs", "chain", "passcode")


@dataclass
class ReasoningDecode(Task):
    """Walk a graph, calculate step by step, remember a code of one's own text.

    subset: some of KINDS; None takes all.
    samples: of dfs, of chain per number of operations, of passcode per distance.
    steps, nodes: of dfs, from and to.  operations: of chain.
    distances, before: of passcode, tokens between the code and where it is asked for, and before it.
    max_new_tokens: of dfs and chain; None: 64 per step and 1,024 more, 16 per operation and 64 more.
    data_seed: of all samples.
    """

    subset: Sequence[str] | str | None = None
    samples: int = 20
    steps: Sequence[int] = (20, 50)
    nodes: Sequence[int] = (20, 30)
    operations: Sequence[int] = (8, 16, 32, 64)
    distances: Sequence[int] = (64, 256, 1024, 4096)
    before: int = 64
    max_new_tokens: int | None = None
    data_seed: int = 42

    mean_over: ClassVar[Literal["categories", "subsets"]] = "categories"

    def __post_init__(self) -> None:
        who = "reasoning_decode"
        self.kinds = chosen(who, "subset", self.subset, KINDS)
        for key in ("samples", "before", *["max_new_tokens"] * (self.max_new_tokens is not None)):
            grid.check_count(who, key, getattr(self, key))
        for key in ("operations", "distances"):
            values = list(getattr(self, key))
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise UserError(f"{who}: task.{key}={values}; give whole numbers of 1 or more, such as [8, 16]")
            setattr(self, key, sorted(set(values)))
        for key, least in (("steps", 1), ("nodes", 2)):
            values = list(getattr(self, key))
            whole = len(values) == 2 and all(type(value) is int for value in values)
            if not whole or not least <= values[0] <= values[1]:
                raise UserError(f"{who}: task.{key}={values}; give the least and the most, such as [20, 50]")
        if self.steps[1] > 2 * self.nodes[1] - 1:
            raise UserError(
                f"{who}: task.steps={list(self.steps)}: a walk over {self.nodes[1]} nodes has {2 * self.nodes[1] - 1} "
                f"steps; give fewer, or more nodes (task.nodes={list(self.nodes)})"
            )
        self._tokens: Tokens | None = None

    @property
    def name(self) -> str:
        return "reasoning_decode-mini"

    def fit(self, tokens: Callable[[], Tokens]) -> None:
        if "passcode" in self.kinds:
            self._tokens = tokens()

    def source(self) -> str:
        return f"{self.name} (made, seed {self.data_seed}), {', '.join(self.kinds)}, {self.samples} samples of each"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.name, "scores": VERSION, "data_sha256": grid.digest_of(self.examples())}

    def examples(self) -> list[Example]:
        return self._examples

    @cached_property
    def _examples(self) -> list[Example]:
        made: dict[str, Callable[[], Iterator[Example]]] = {
            "dfs": lambda: graphs.examples(self.samples, self.steps, self.nodes, self.data_seed, self.max_new_tokens),
            "chain": lambda: chain.examples(self.samples, self.operations, self.data_seed, self.max_new_tokens),
            "passcode": self._passcodes,
        }
        return [example for kind in self.kinds for example in made[kind]()]

    def _passcodes(self) -> Iterator[Example]:
        assert self._tokens is not None, "passcode counts tokens: fit comes first"
        return passcode.examples(self.samples, self.distances, self.before, self.data_seed, self._tokens)

    def score(self, example: Example, prediction: str) -> float:
        return _SCORES[example.tags["category"].split()[0]](prediction, example.answers[0])

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """One line per subset, then categories, and their average, in which no control counts."""
        subsets = self._subsets(examples)
        counted = [(tags, mean) for tags, mean in subsets if not tags.get("control")]
        return [mean for _, mean in subsets] + mean_by_category(subsets) + self._averages(counted)

    def remarks(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        walks = [(example, ours["prediction"]) for example, ours, _ in rows if example.tags["category"] == "dfs"]
        if not walks:
            return []
        read = fmean(graphs.last_object(text) is not None for _, text in walks)
        official = fmean(graphs.same(graphs.first_object(text), example.answers[0]) for example, text in walks)
        return [f"dfs: {read:.0%} of answers hold an object that can be read; the released grader gives "
                f"{100 * official:.2f}"]  # fmt: skip


_SCORES: dict[str, Callable[[str, str], float]] = {
    "dfs": lambda prediction, answer: graphs.same(graphs.last_object(prediction), answer),
    "chain": chain.score,
    "passcode": passcode.score,
}
