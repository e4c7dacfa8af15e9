"""How answers are drawn: what the settings say, laid over what the task does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from methods.core.errors import UserError
from tasks.base import Example, Task
from tasks.sampling import GREEDY, Sampling


def sampling_of(task: Task, given: Mapping[str, Any]) -> Sampling:
    """The settings `sampling` where they say something, else the task's own.

    Raises UserError where they say how to draw and nothing is drawn.
    """
    typed = {str(key): value for key, value in given.items() if value is not None}
    sampling = dataclasses.replace(task.sampling, **typed)
    if not sampling.temperature:
        for key, value in typed.items():
            if value != getattr(GREEDY, key):
                raise UserError(
                    f"sampling.{key}={value}: at sampling.temperature=0 the likeliest token is taken and nothing is "
                    "drawn; give a temperature above 0, such as 0.6, or leave it out"
                )
        return GREEDY
    return sampling


def check_sampling(sampling: Sampling, examples: Sequence[Example]) -> None:
    """Raises UserError where these examples have no answers that can be drawn."""
    if not sampling.temperature:
        return
    key = f"sampling.temperature={sampling.temperature:g}"
    if not any(example.kind in ("answer", "turns") for example in examples):
        raise UserError(f"{key}: no sample of this task has an answer that is generated; leave it out")
    if any(example.beams > 1 for example in examples):
        raise UserError(f"{key}: a beam search draws nothing; give task.beams=1, or leave it out")
    if sampling.repeats > 1 and any(example.kind == "turns" for example in examples):
        raise UserError(
            f"sampling.repeats={sampling.repeats}: several questions on one context are answered once; give 1"
        )


def told(sampling: Sampling) -> dict[str, Any]:
    """What is not as it is where the likeliest tokens are taken, as a record and a screen name it."""
    return {key: value for key, value in dataclasses.asdict(sampling).items() if value != getattr(GREEDY, key)}
