"""The last lines that a run prints: the result table, and the paths of student and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.config import Config
from opd.reporting.files import REPORT_FILE
from opd.reporting.summary import summary_notes, summary_rows, summary_table, summary_text
from opd.trainer.saving import saved_as


def show_result(config: Config, summary: Mapping[str, Any] | None) -> None:
    """Print the result table when there was an evaluation, then the paths."""
    console = Console()
    if summary is not None:
        rows = summary_rows(summary)
        console.print(
            summary_table(rows) if console.is_terminal else summary_text(rows), soft_wrap=not console.is_terminal
        )
        for note in summary_notes(summary):
            print(f"note: {note}")
    folder = Path(config.run_dir)
    # Not through the console, which reads brackets as markup and widens tabs.
    dtype = saved_as(folder / "student")
    print(f"student: {folder / 'student'}{f' ({dtype})' if dtype else ''}")
    if (folder / REPORT_FILE).exists():  # a report that could not be written was a warning
        print(f"report:  {folder / REPORT_FILE}")
