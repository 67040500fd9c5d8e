"""The result of a run: one row each for the student before, the student after, and the teacher."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console, RenderableType
from rich.table import Table

from opd.errors import RunFolderError
from opd.reporting.files import SUMMARY_FILE, explain_os_errors, strict_json, write_atomically

ROW_TITLES = {"student_before": "student before", "student_after": "student after", "teacher": "teacher"}
NO_VALUE = "—"
PLAIN_WIDTH = 200  # wide enough that no column wraps in a log file

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One evaluated model. Accuracies are shares in [0, 1]; reverse KL is in nats per token."""

    title: str
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    reverse_kl: float | None = None
    reverse_kl_interval: Interval | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    """More columns; names that start with "accuracy" are shown as percentages."""
    extra_intervals: Mapping[str, Interval] = field(default_factory=dict)
    shown: str | None = None
    """Key of the recipe that shows the teacher more than the student sees."""

    @property
    def label(self) -> str:
        """The title, with the key of the recipe that shows this model more than the others."""
        return self.title if self.shown is None else f"{self.title}, shown {self.shown}"


def summary_rows(summary: Mapping[str, Any]) -> list[SummaryRow]:
    """The rows of a `summary.json`: those of "student_before", "student_after" and "teacher" that it has."""
    return [_row(title, summary[key]) for key, title in ROW_TITLES.items() if isinstance(summary.get(key), Mapping)]


def summary_notes(summary: Mapping[str, Any]) -> list[str]:
    """The notes of a summary, as sentences."""
    notes = summary.get("notes")
    return [str(note) for note in notes] if isinstance(notes, (list, tuple)) else []


def summary_cells(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells, as text; a column that no row fills is left out."""
    extras = list(dict.fromkeys(name for row in rows for name in row.extra))
    columns: list[tuple[str, list[str]]] = [
        ("accuracy", [share(row.accuracy, row.accuracy_interval) for row in rows]),
        ("reverse KL (nats)", [number(row.reverse_kl, row.reverse_kl_interval) for row in rows]),
    ]
    for name in extras:
        show = share if name.startswith("accuracy") else number
        cells = [show(row.extra.get(name), row.extra_intervals.get(name)) for row in rows]
        columns.append((column_title(name), cells))
    filled = [(title, cells) for title, cells in columns if any(cell != NO_VALUE for cell in cells)]
    titles = ["", *(title for title, _ in filled)]
    return titles, [[row.label, *(cells[i] for _, cells in filled)] for i, row in enumerate(rows)]


def share(value: float | None, interval: Interval | None = None) -> str:
    """62.5% [55.0, 69.0]"""
    return with_interval(value, interval, lambda part: f"{100 * part:.1f}", "%")


def number(value: float | None, interval: Interval | None = None) -> str:
    """0.0625 [0.0500, 0.0750]"""
    return with_interval(value, interval, lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:#.3g}")


def with_interval(value: float | None, interval: Interval | None, show: Callable[[float], str], unit: str = "") -> str:
    """A value and its unit, with its interval in brackets where there is one; `NO_VALUE` for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    text = show(value) + unit
    if interval is None or not all(map(math.isfinite, interval)):
        return text
    return f"{text} [{show(interval[0])}, {show(interval[1])}]"


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """The rows as a rich table."""
    titles, cells = summary_cells(rows)
    table = Table(title="Result, with 95% confidence intervals", title_justify="left")
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row, style="bold" if row[0] == ROW_TITLES["student_after"] else None)
    return table


def summary_text(rows: Sequence[SummaryRow]) -> str:
    """The rows as plain text, for logs and pipes."""
    return plain_text(summary_table(rows))


def plain_text(content: RenderableType) -> str:
    """What rich would show, without colours and wide enough that no column wraps."""
    console = Console(width=PLAIN_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write `summary` as JSON, atomically; NaN and infinity become null. Raises `RunFolderError`."""
    text = json.dumps(strict_json(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), (text + "\n").encode("utf-8", "backslashreplace"))


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """The content of `summary.json`, or None for a run that has not ended. Raises `RunFolderError`."""
    path = Path(run_dir) / SUMMARY_FILE
    with explain_os_errors("read", path):
        if not path.exists():
            return None
        raw = path.read_bytes()
    try:
        summary = json.loads(raw)
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON ({error}). Delete it, or restore it.") from error
    if not isinstance(summary, dict):
        raise RunFolderError(f"{path} holds no JSON object. Delete it, or restore it.")
    return summary


def column_title(name: str) -> str:
    """The title of a metric's column: accuracy_greedy → "accuracy, greedy", accuracy_t0.5 → "accuracy, T = 0.5"."""
    if temperature := re.fullmatch(r"accuracy_t([0-9.]+)", name):
        return f"accuracy, T = {temperature[1]}"
    return re.sub("^accuracy_", "accuracy, ", name).replace("_", " ")


def _row(title: str, values: Mapping[str, Any]) -> SummaryRow:
    known = {"accuracy", "reverse_kl"}
    numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
    intervals = {
        key.removesuffix("_interval"): cast(Interval, (float(value[0]), float(value[1])))
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    }
    return SummaryRow(
        title=title,
        accuracy=numbers.get("accuracy"),
        accuracy_interval=intervals.get("interval", intervals.get("accuracy")),
        reverse_kl=numbers.get("reverse_kl"),
        reverse_kl_interval=intervals.get("reverse_kl"),
        extra={key: value for key, value in numbers.items() if key not in known},
        extra_intervals={key: value for key, value in intervals.items() if key not in known},
        shown=str(values["shown"]) if values.get("shown") else None,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
