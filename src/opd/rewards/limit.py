"""A time limit for a user's function, in the same process."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from types import FrameType
from typing import TypeVar

Value = TypeVar("Value")
INSIST = 1.0  # seconds until a function that caught an interruption gets another


class TimeLimitError(Exception):
    """A function exceeded its time limit."""


class _TimeIsUp(BaseException):
    """The interruption; no Exception, so that `except Exception` in the function lets it through."""


def call_within(seconds: float, function: Callable[..., Value], *arguments: object) -> Value:
    """function(*arguments), or TimeLimitError after that many seconds; 0 sets no limit.

    In the main thread an alarm signal interrupts Python code, sleeps, reads and regular expressions; another timer in use is put back.
    Signals do not arrive in other threads: there the function runs in a thread of its own, which is left behind when its time is up and
    interrupted at its next step in Python code. Nothing interrupts a C extension that never returns to Python.
    """
    if seconds <= 0:
        return function(*arguments)
    if threading.current_thread() is not threading.main_thread():
        return _in_worker(seconds, function, *arguments)

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
        raise _exceeded(seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining - (time.monotonic() - began)), interval)


def _in_worker(seconds: float, function: Callable[..., Value], *arguments: object) -> Value:
    """The same off the main thread."""
    outcome: Future[Value] = Future()
    context = copy_context()

    def work() -> None:
        try:
            outcome.set_result(context.run(function, *arguments))
        except BaseException as error:  # handed to the caller's thread
            outcome.set_exception(error)

    worker = threading.Thread(target=work, name="opd reward", daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeIsUp))
        raise _exceeded(seconds)
    return outcome.result()


def _exceeded(seconds: float) -> TimeLimitError:
    return TimeLimitError(f"no answer within {seconds:g} s")
