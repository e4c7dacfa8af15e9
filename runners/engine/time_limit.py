"""A limit on the time that samples may take, kept at the model's passes: one sample cannot hold up all others."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from methods.core.errors import UserError

# of a chat template, which writes text around a text; one of a few nested loops never ends
TEMPLATE_S = 60.0
# until when the samples in hand may take, and the seconds that they were given
_LIMIT: ContextVar[tuple[float, float] | None] = ContextVar("limit", default=None)


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
    token = _LIMIT.set((until, seconds))
    try:
        yield
    finally:
        _LIMIT.reset(token)
        hook.remove()


@contextlib.contextmanager
def within_template() -> Iterator[None]:
    """Inside the block a chat template, which is code of the model's folder, is broken off when it takes too long.

    Raises TimeLimit once the time of the samples in hand is up, UserError after TEMPLATE_S. Python's own signals do
    it, which only its main thread receives; elsewhere nothing is broken off.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    limit = _LIMIT.get()
    left = None if limit is None else limit[0] - time.perf_counter()
    error: Exception = UserError(
        f"model: its chat template takes longer than {TEMPLATE_S:g} seconds; model.chat=false leaves it out"
    )
    seconds = TEMPLATE_S
    if limit is not None and left is not None and left < seconds:
        error, seconds = TimeLimit(limit[1]), max(left, 0.001)

    def late(*_: Any) -> None:
        raise error

    began = time.perf_counter()
    handler = signal.signal(signal.SIGALRM, late)
    before, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # somebody else's timer goes on
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.perf_counter() - began), 0.001), every)
