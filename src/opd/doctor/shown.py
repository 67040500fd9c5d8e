"""Checks as a table for a terminal, and as one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.doctor.check import Check, Number, worst
from opd.errors import printable

STYLES = {"green": "green", "yellow": "yellow", "red": "bold red", "skipped": "dim"}
MIN_WIDTH = 80  # of a table that goes to a file or a pipe


def show_table(checks: Sequence[Check], stream: TextIO) -> None:
    """Print one row per check, then what to do about every check that is not green. Every verdict is a word too, so colour is no need."""
    console = Console(file=stream, soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, width=max(MIN_WIDTH, console.width), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("check", "verdict", "numbers"):
        table.add_column(title, overflow="fold", no_wrap=title == "verdict")
    for check in checks:
        numbers = ", ".join(f"{name} {shown_number(value)}" for name, value in check.numbers.items())
        row = (check.name, check.verdict, numbers or check.seen)
        cells = [Text(printable(cell)) for cell in row]
        cells[1].stylize(STYLES[check.verdict])
        table.add_row(*cells)
    console.print(table)
    for check in checks:
        if check.verdict in ("yellow", "red") or check.details:
            console.print()
            _show_more(check, console)
    console.print()
    console.print(Text(summary(checks)))


def _show_more(check: Check, console: Console) -> None:
    head = Text(f"{check.verdict} ", style=STYLES[check.verdict])
    console.print(head + Text(printable(f"{check.name}: {check.seen}"), style="default"))
    for label, words in (("why", check.why), ("mend", check.mend)):
        if words:
            console.print(Text(printable(f"  {label}: {words}")))
    for line in check.details:
        console.print(Text(printable(f"  {line}")))


def summary(checks: Sequence[Check]) -> str:
    """One line: how many checks have each verdict."""
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in STYLES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def shown_number(value: Number) -> str:
    """A number with three digits; an estimate with its interval in brackets."""
    if isinstance(value, str):
        return value
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)):
        return str(value) if isinstance(value, int) else f"{value:.3g}"
    if len(value) == 3:
        return f"{value[0]:.3g} [{value[1]:.3g}, {value[2]:.3g}]"
    return " ".join(f"{one:.3g}" for one in value)


def as_json(checks: Sequence[Check], recipe: str | None) -> str:
    """One JSON document. Numbers that are not finite are null, which JSON has no other word for."""
    document = {
        "recipe": recipe,
        "verdict": worst(checks),
        "checks": [
            {
                "name": check.name,
                "verdict": check.verdict,
                "seen": check.seen,
                "numbers": {name: _plain(value) for name, value in check.numbers.items()},
                "why": check.why,
                "mend": check.mend,
                "details": list(check.details),
            }
            for check in checks
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Number) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
