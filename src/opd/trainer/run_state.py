"""Files that tell how a run goes on while it does: state.json, and the report. Neither may end a run, or take its time."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opd.errors import OpdError, printable
from opd.reporting.about import StateName, read_state, write_state
from opd.reporting.files import STATE_FILE
from opd.reporting.report import write_report

SHARE = 0.02
"""Part of a run's time that each of the two files may take."""
STATE_EVERY_S = 1.0
REPORT_EVERY_S = 60.0
FIRST_REPORT_S = 0.1
"""Presumed cost of the first report, which is due 5 seconds after the start: a run that is over by then writes one at its end."""
LONGEST_WHY = 300  # characters

Warn = Callable[[str, str], object]
"""Prints the text unless one of the kind that the second argument names was printed before."""


class Pace:
    """Work that is done at most every `every` seconds, and takes no more than SHARE of all time."""

    def __init__(self, every: float, presumed: float, clock: Callable[[], float]) -> None:
        self._every = every
        self._clock = clock
        self._last = clock()
        self._cost = presumed

    def due(self, *, early: bool = False) -> bool:
        """True where it is time again; `early` asks no more than that it is affordable."""
        waited = self._clock() - self._last
        return waited * SHARE >= self._cost and (early or waited >= self._every)

    def do(self, work: Callable[[], object]) -> None:
        """Do it, and measure what it costs."""
        began = self._clock()
        try:
            work()
        finally:
            self._last = self._clock()
            self._cost = self._last - began


class RunState:
    """Writes state.json and report.html of one run as it goes on. What cannot be written is said once."""

    def __init__(
        self, folder: Path, steps: int, warn: Warn, *, step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.step = step
        self.steps = steps
        self.warn = warn
        self._states = Pace(STATE_EVERY_S, 0.0, clock)
        self._reports = Pace(REPORT_EVERY_S, FIRST_REPORT_S, clock)
        self._reported = False

    def running(self, step: int, *, evaluated: bool = False) -> None:
        """The run has had `step` updates, or an evaluation; write what is due."""
        self.step = step
        if self._states.due():
            self.write("running")
        if self._reports.due(early=evaluated or not self._reported):
            self.write("running")
            self._reports.do(self.report)
            self._reported = True

    def write(self, name: StateName, why: str = "") -> None:
        """Write state.json now."""

        def work() -> None:
            try:
                write_state(self.folder, name, self.step, self.steps, why)
            except OpdError as error:
                self.warn(f"{error} The run goes on; its report cannot say how far it is.", "state")

        self._states.do(work)

    def report(self) -> bool:
        """Write the report now; False, and a warning, where it cannot be written."""
        return write_report_or_warn(self.folder, self.warn)

    def ended(self, name: StateName, why: str = "") -> None:
        """The run is over: state and report, whatever they cost."""
        self.write(name, why)
        self.report()


def write_report_or_warn(folder: Path, warn: Warn) -> bool:
    """Write a run's report; False, and a warning, where it cannot be written."""
    try:
        write_report(folder)
    except Exception as error:  # the training is worth more than its picture
        said = str(error) if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
        advice = f"opd report {shlex.quote(str(folder))}"
        warn(
            f"The report could not be written: {said.rstrip('.')}. The run itself is not affected; write it later with: {advice}",
            "report",
        )
        return False
    return True


class BeforeTheRun:
    """state.json while models load. A run that was not begun leaves it as it was: nothing is claimed, and nothing lost."""

    def __init__(self, folder: Path, *, replaces: bool) -> None:
        """`replaces` is a run that will be overwritten once this one can start, and keeps its state until then."""
        self._path = folder / STATE_FILE
        self._folder = folder
        self._quiet = replaces
        self._old: bytes | None = None

    def loading(self, steps: int) -> None:
        """Say that models are loading."""
        if self._quiet:
            return
        with suppress(OSError):
            self._old = self._path.read_bytes()
        with suppress(OpdError):
            known = read_state(self._folder)
            write_state(self._folder, "loading", 0 if known is None else known.step, steps)

    def undo(self) -> None:
        """Put the old state back."""
        if self._quiet:
            return
        with suppress(OSError):
            if self._old is None:
                self._path.unlink(missing_ok=True)
            else:
                self._path.write_bytes(self._old)


def why_of(error: BaseException) -> str:
    """The first sentence of an exception."""
    text = " ".join(str(error).split())
    first = text.split(". ")[0].rstrip(".")
    shown = (
        first if isinstance(error, OpdError) else f"{type(error).__name__}: {first}" if first else type(error).__name__
    )
    return printable(shown[:LONGEST_WHY])
