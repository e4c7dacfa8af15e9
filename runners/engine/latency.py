"""Times and bytes of methods on the same random prompt, in turns.

Every round begins all of them anew. Each reads the prompt by itself, in an order that is turned around from round to
round; then they decode in turns, a few steps each, so that what else the machine does hits all alike. One round before
the first is not recorded: it loads, compiles and warms up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from methods.core.contract import Method
from methods.core.errors import UserError
from methods.core.meter import Report
from runners.engine.generation import start
from runners.engine.session import now
from tasks.base import Example, Timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# steps of one turn: away from the CPU the end of each turn waits for the device
TURN = {"cpu": 1, "cuda": 8}
WARM_STEPS = 8


@dataclass
class Times:
    """What one method took.

    prompts, steps: of every round, seconds until the first token is known, and of one decode step, the median over its
    turns.  ledger: bytes of the last round.  device_prompt, device_decode: the most that the device's allocator held
    beyond what lay there before the prompt, the cache included, and before a turn of decoding; bytes, 0 on a CPU.
    """

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    ledger: Report | None = None
    device_prompt: int = 0
    device_decode: int = 0

    @property
    def prompt(self) -> float:
        """Seconds until the first token is known, median over rounds."""
        return median(self.prompts)

    @property
    def step(self) -> float:
        """Seconds of a decode step, median over rounds."""
        return median(self.steps)

    def add(self, round_: _Running, step: float) -> None:
        """One more round, in which a decode step took so many seconds."""
        self.prompts.append(round_.prompt)
        self.steps.append(step)
        self.ledger = round_.cache.report()
        self.device_prompt = max(self.device_prompt, round_.device_prompt)
        self.device_decode = max(self.device_decode, round_.device_decode)

    def to_dict(self) -> dict[str, Any]:
        """All but the ledger, ready for JSON; seconds to the tenth of a microsecond."""
        fields = dataclasses.asdict(dataclasses.replace(self, ledger=None))
        del fields["ledger"]
        return fields | {key: [round(value, 7) for value in fields[key]] for key in ("prompts", "steps")}


def check_lengths(examples: Sequence[Example], window: int | None) -> None:
    """Raises UserError for a prompt that a model of so many positions has no room for."""
    for timed in (example.timed for example in examples if example.timed is not None):
        if window is not None and timed.length + timed.steps > window:
            raise UserError(
                f"task.lengths={timed.length}: this model has {window} positions, of which the new tokens take "
                f"{timed.steps}; give {window - timed.steps} or less"
            )


@torch.inference_mode()
def measure(model: PreTrainedModel, methods: Sequence[Method], timed: Timed, chunk: int | None = None) -> list[Times]:
    """The times of each method."""
    prompts, times = random_tokens(model, timed), [Times() for _ in methods]
    for round_ in range(-1, timed.rounds):
        warming = round_ < 0
        order = [*range(len(methods))][:: -1 if round_ % 2 else 1]
        left = min(WARM_STEPS, timed.steps) if warming else timed.steps
        running = {i: _Running(model, methods[i], prompts, chunk) for i in order}
        for one in running.values():
            one.session.expect(left)
        turns: list[list[float]] = [[] for _ in methods]
        while left > 0:
            n = min(left, TURN.get(model.device.type, 1))
            for i in order:
                turns[i].append(running[i].decode(n))
            left -= n
        while running:  # taken out one by one: the next round needs their room
            i, one = running.popitem()
            if not warming:
                times[i].add(one, median(turns[i]))
            del one
    return times


def random_tokens(model: PreTrainedModel, timed: Timed) -> list[list[int]]:
    """Rows of random token ids, the same for all methods."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(timed.seed)
    return torch.randint(size, (timed.batch, timed.length), generator=generator).tolist()


class _Running:
    """One method in one round: it has read the prompt when it is made.

    prompt: seconds that took, the first token included.  device_prompt, device_decode: as in Times.
    """

    def __init__(self, model: PreTrainedModel, method: Method, prompts: Sequence[Sequence[int]], chunk: int | None):
        self.device, self.device_decode = model.device, 0
        before = self._begin()
        began = now(self.device)
        self.session, logits = start(model, method, prompts, list(range(len(prompts))), chunk)
        self.token = logits.argmax(-1)  # [B]
        self.prompt = now(self.device) - began
        self.device_prompt = self._peak() - before

    @property
    def cache(self) -> Any:
        return self.session.cache

    def decode(self, steps: int) -> float:
        """Seconds of one of so many steps, the choice of its token included."""
        before = self._begin()
        began = now(self.device)
        for _ in range(steps):
            self.token = self.session.run(self.token[:, None]).argmax(-1)
        took = now(self.device) - began
        self.device_decode = max(self.device_decode, self._peak() - before)
        return took / steps

    def _begin(self) -> int:
        """Bytes that lie on the device now; its peak is counted from here."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
