"""Progress of training: a live display in a terminal, one line every few steps elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opd.errors import printable

ProgressMode = Literal["auto", "rich", "plain", "off"]
TrainingPhase = Literal["rollout", "teacher", "update", "eval"]

PLAIN_EVERY = 10  # steps per line
PLAIN_SILENCE_S = 60.0  # a slow run still prints a line every minute
ETA_STEPS = 20  # steps whose mean duration predicts the rest
REFRESH_PER_S = 4

SHOWN_CHARACTERS = 1000  # of a prompt, and of an answer
SAME = 1e-6  # relative: loss and reverse KL are the same number, summed in another order

# (metric, label, format)
SHOWN = (
    ("loss", "loss", "{:.4g}"),
    ("reverse_kl", "reverse KL", "{:.4g}"),
    ("reward/mean", "reward", "{:.3g}"),
    ("truncated", "truncated", "{:.0%}"),
    ("natural/predicted_kl", "step KL", "{:.2g}"),
    ("time/tokens_per_second", "tokens/s", "{:,.0f}"),
)


class Progress:
    """Display of the updates `start` to `total_steps`; a context manager.

    `enabled="auto"` is "rich" in a terminal and "plain" in a pipe, a dumb terminal or continuous integration. "off"
    prints nothing at all.
    """

    def __init__(
        self,
        total_steps: int,
        start: int = 0,
        *,
        enabled: ProgressMode = "auto",
        plain_every: int = PLAIN_EVERY,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], str] = str,
    ) -> None:
        """`memory` says how much is in use, such as "GPU 12.3 GB"; nothing by itself."""
        self._stream = sys.stdout if stream is None else stream
        self.mode = choose_mode(self._stream) if enabled == "auto" else enabled
        self._total = total_steps
        self._completed = start
        self._plain_every = plain_every
        self._clock = clock
        self._memory = memory
        self._spoke = False
        self._times: deque[float] = deque(maxlen=ETA_STEPS + 1)
        self._last_line = -math.inf
        self._phase: str = ""
        self._numbers: list[str] = []
        self._live: Live | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Progress:
        self._times.append(self._clock())
        self._last_line = self._times[-1]
        if self.mode == "rich":
            console = Console(file=self._stream)
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=REFRESH_PER_S)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._phase = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update number `step`, from 0, has completed with these metrics."""
        self._completed = step + 1
        self._times.append(self._clock())
        shown = [name for name, _, _ in SHOWN if name in metrics and not (name == "reverse_kl" and _same(metrics))]
        self._numbers = [f"{words} {form.format(metrics[name])}" for name, words, form in SHOWN if name in shown]
        self._numbers += [used] if (used := self._memory()) else []
        if self.mode == "plain":
            self._print_line_if_due()

    def phase(self, name: TrainingPhase) -> None:
        """Show the phase that the step is in."""
        self._phase = name
        if self._live is not None:
            self._live.refresh()

    def sample(self, heading: str, prompt: str, answer: str) -> None:
        """Show one sampled answer under a heading; both are quoted, so they cannot command the terminal."""
        lines = [heading, *quoted("prompt", prompt), *quoted("answer", answer)]
        self.message("\n".join(lines))

    def message(self, text: str) -> None:
        """Print a line that stays, above the live display."""
        print_line(text, self._live, None if self.mode == "off" else self._stream)

    def warn_once(self, text: str | None, kind: str) -> None:
        """Print a warning unless it is None or one of its kind was printed before."""
        if text is not None and kind not in self._warned:
            self._warned.add(kind)
            self.message(f"warning: {text}")

    @property
    def seconds_left(self) -> float | None:
        """Time left, from the mean duration of the last steps; None before the first one."""
        if len(self._times) < 2:
            return None
        per_step = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return per_step * max(self._total - self._completed, 0)

    def _print_line_if_due(self) -> None:
        now = self._times[-1]
        is_last = self._completed >= self._total
        waits = self._completed % self._plain_every and now - self._last_line < PLAIN_SILENCE_S
        if self._spoke and not is_last and waits:
            return
        self._spoke = True
        self._last_line = now
        parts = [f"step {self._completed}/{self._total}", *self._numbers]
        if not is_last:
            parts.append(self._eta())
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text(f"{self._phase:<7}", style="cyan"),
            ProgressBar(total=max(self._total, 1), completed=self._completed),
            Text(f"{self._completed}/{self._total}"),
            Text(self._eta(), style="dim"),
        )
        return Group(bar, Text(" · ".join(self._numbers), style="dim")) if self._numbers else Group(bar)

    def _eta(self) -> str:
        seconds = self.seconds_left
        return "" if seconds is None else f"ETA {duration(seconds)}"


def _same(metrics: Mapping[str, float]) -> bool:
    """The loss is the reverse KL itself."""
    return math.isclose(metrics.get("loss", math.nan), metrics["reverse_kl"], rel_tol=SAME, abs_tol=0.0)


def quoted(label: str, text: str) -> list[str]:
    """Lines of a text in a margin that it cannot leave, cut where it is very long."""
    shown = text[:SHOWN_CHARACTERS].replace("\r\n", "\n")
    more = [f"… and {len(text) - SHOWN_CHARACTERS:,} more characters"] if len(text) > SHOWN_CHARACTERS else []
    lines = [*shown.split("\n"), *more]
    return [f"  {label if number == 0 else '':<6} │ {line}" for number, line in enumerate(lines)]


def print_line(text: str, live: Live | None, stream: TextIO | None) -> None:
    """A line that stays: above a live display where there is one, else on the stream, or nowhere. It cannot command a terminal."""
    text = printable(text)
    if live is not None:
        live.console.print(Text(text))
    elif stream is not None:
        print(text, file=stream, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3:07 or 1:02:45."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def choose_mode(stream: TextIO) -> Literal["rich", "plain"]:
    """The display of progress="auto"."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    live = stream.isatty() and not in_ci and os.environ.get("TERM") != "dumb"
    return "rich" if live else "plain"
