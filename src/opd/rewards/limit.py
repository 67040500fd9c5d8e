"""A time limit for a user's function, in the same process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from opd.errors import ConfigError

Value = TypeVar("Value")
INSIST = 1.0  # seconds until a function that caught an interruption gets another


class TimeLimitError(Exception):
    """A function exceeded its time limit."""


class _TimeIsUp(BaseException):
    """The interruption; no Exception, so that `except Exception` in the function lets it through."""


def call_within(seconds: float, function: Callable[..., Value], *arguments: object) -> Value:
    """function(*arguments), or TimeLimitError after that many seconds; 0 sets no limit.

    An alarm signal interrupts Python code, sleeps, reads and regular expressions, but no C extension that never returns to
    Python. Restores another timer in use. Raises ConfigError outside the main thread, where signals do not arrive.
    """
    if seconds <= 0:
        return function(*arguments)
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "reward.timeout interrupts a reward by a signal, and signals reach the main thread only; call train() from there, or set "
            "reward.timeout=0."
        )

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeIsUp

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, INSIST)
    try:
        try:
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUp:
        raise TimeLimitError(f"no answer within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining - (time.monotonic() - began)), interval)
