"""SIGINT, SIGTERM and SIGHUP while a run goes on: the first ends it after the step, saved; the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 5.0  # torchrun sends its processes the signal that a terminal has sent them already
LEFT_TO_PYTHON = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers that are replaced, beside those that say so by an attribute `gives_way`, which is the command line's. A program's own
handler, and an ignored signal (nohup), stay."""


class RunStopped(KeyboardInterrupt):
    """A signal ended the run. It is not an Exception, because nothing is wrong.

    `next` says how the run goes on: "resume" (there is a checkpoint), "overwrite" (nothing was saved, and the folder holds the
    beginning of a run) or "again" (nothing was written).
    """

    def __init__(self, facts: str, *, signal_number: int, next: Literal["resume", "overwrite", "again"]) -> None:
        how = {
            "resume": " Go on with resume=True.",
            "overwrite": " Start again with overwrite=True.",
            "again": " Start again.",
        }
        super().__init__(facts + how[next])
        self.facts = facts
        self.signal_number = signal_number
        self.next: Literal["resume", "overwrite", "again"] = next


class Stop(Exception):
    """Raised by a callback, ends the run after its step: student saved, report written. A message says why."""


class Interrupted(KeyboardInterrupt):
    """The first signal, where it can end things: never in the middle of a step."""


class StopRequest:
    """Installs the handlers (a context manager, in the main thread; elsewhere signals do not arrive) and tells whether a signal came.

    Outside `whole_steps`, and inside `at_once`, the first signal raises Interrupted where it arrives.
    """

    def __init__(self, *, echo_s: float = 0.0) -> None:
        """A second signal within `echo_s` seconds is taken for the first one's echo."""
        self.echo_s = echo_s
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self.second = False
        self._at_once = True
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            now = {number: signal.getsignal(number) for number in SIGNALS}
            mine = [n for n, handler in now.items() if handler in LEFT_TO_PYTHON or hasattr(handler, "gives_way")]
            self._before = {number: signal.signal(number, self._handle) for number in mine}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._since < self.echo_s:
                return
            self.second = True
            raise KeyboardInterrupt
        self.signal, self._since = signal.Signals(number), time.monotonic()
        if self._at_once:
            raise Interrupted
        # Not print: this may be in the middle of one.
        os.write(
            2,
            f"\n{self.signal.name}: the step is finished and saved first; a second signal ends the run at once.\n".encode(),
        )

    @contextmanager
    def whole_steps(self) -> Iterator[None]:
        """Inside, a signal waits for `check` or `at_once`."""
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, the first signal need not wait: everything that was trained can be saved."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted
