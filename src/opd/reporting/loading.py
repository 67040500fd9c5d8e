"""Display of what a run loads before its first step: a line with the seconds so far in a terminal, one line each elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from opd.errors import printable
from opd.reporting.progress import REFRESH_PER_S, ProgressMode, choose_mode, duration, print_line


class Loading:
    """A context manager; `enabled` as of `Progress`."""

    def __init__(
        self,
        *,
        enabled: ProgressMode = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.mode = choose_mode(self._stream) if enabled == "auto" else enabled
        self._clock = clock
        self._live: Live | None = None

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, text: str, *, here: bool = True) -> None:
        """Say what is loaded from now on. A model that is not `here` is downloaded, and its progress bars need the terminal."""
        self._end()
        if self.mode != "rich" or not here:
            self.message(text)
            return
        spinner, began, words = Spinner("dots", style="cyan"), self._clock(), Text(printable(text))

        def shown() -> Table:
            row = Table.grid(padding=(0, 1))
            row.add_row(spinner, words, Text(duration(self._clock() - began), style="dim"))
            return row

        console = Console(file=self._stream)
        self._live = Live(get_renderable=shown, console=console, refresh_per_second=2 * REFRESH_PER_S, transient=True)
        self._live.start(refresh=True)

    def message(self, text: str) -> None:
        """Print a line that stays."""
        print_line(text, self._live, None if self.mode == "off" else self._stream)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
