"""Ctrl-C, and the signals that ask a process to end: the work in hand stops once, and what is done stays.

The first signal is raised as KeyboardInterrupt wherever the program is; whoever catches it says what is kept. A second
one within a moment is the same key pressed twice; a later one does not wait for the end of the first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import cache
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
MOMENT_S = 1.0
POLL_S = 0.5

_came: tuple[int, float] | None = None  # the first signal, and when


def listen() -> None:
    """Take the signals of this process from now on, but for those that it was started to ignore (nohup)."""
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def code() -> int:
    """The exit code of a call that was stopped: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (_came[0] if _came else signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    global _came
    if _came is None:
        _came = number, time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - _came[1] > MOMENT_S:
        os.write(2, b"stopped at once\n")  # not print: it may be what the signal has interrupted
        os._exit(code())


@cache
def end_with(parent: int) -> None:
    """Let this process, a worker, end as soon as the one that started it is gone: nobody else would end it then.

    parent: that one, or this process itself where a single worker is none of its own; nothing is to be done then.
    """
    if parent == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(128 + signal.SIGTERM)  # records are whole at any moment

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()
