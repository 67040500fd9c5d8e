"""The last lines a run prints: the table, and where things are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.config import Config
from opd.reporting.summary import summary_rows, summary_table


def show_result(config: Config, summary: Mapping[str, Any] | None) -> None:
    """The before-and-after table when there was an evaluation, then the paths."""
    console = Console()
    if summary is not None:
        console.print(summary_table(summary_rows(summary)))
    folder = Path(config.run_dir)
    console.print(f"student: {folder / 'student'}\nreport:  {folder / 'report.html'}", highlight=False, soft_wrap=True)
