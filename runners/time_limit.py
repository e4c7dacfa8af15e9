"""A limit on the time that samples may take, kept at the model's passes: one sample cannot hold up all others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import nn


class TimeLimit(RuntimeError):
    """A sample took longer than it may."""

    def __init__(self, seconds: float):
        super().__init__(f"was not done within time_limit={seconds:g} seconds")


@contextlib.contextmanager
def within(model: nn.Module, seconds: float | None, spent: float = 0.0) -> Iterator[None]:
    """Inside the block a pass of `model` raises TimeLimit instead of beginning once the time is up; None: never.

    spent: seconds of the limit that are gone already.
    A pass that has begun is not broken off, and no device is waited for.
    """
    if seconds is None:
        yield
        return
    until = time.perf_counter() + seconds - spent

    def look(*_: Any) -> None:
        if time.perf_counter() > until:
            raise TimeLimit(seconds)

    hook = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
