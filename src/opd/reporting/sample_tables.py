"""Sampled answers as tables for metric sinks: one per step, phase and model, complete when an answer of another comes."""

from __future__ import annotations

import html
from typing import Any

from opd.reporting.record import SampleRecord

COLUMNS = ("prompt", "response", "answer", "reward", "mean reverse KL (nats)", "finished")
MARKUP = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]()#+-.!|"})

Tables = dict[tuple[str, int], list[list[Any]]]
"""(name, step) → rows along COLUMNS."""


class SampleTables:
    """Collects answers until those of another step, phase or model begin."""

    def __init__(self) -> None:
        self._tables: Tables = {}

    def add(self, record: SampleRecord) -> Tables:
        """Keep one answer; the tables that are complete with it."""
        key = (f"samples/{record.phase}/{record.who}", record.step)
        complete = self.take() if self._tables and key not in self._tables else {}
        self._tables.setdefault(key, []).append(_row(record))
        return complete

    def take(self) -> Tables:
        """The tables so far, which are then forgotten."""
        taken, self._tables = self._tables, {}
        return taken


def markdown(rows: list[list[Any]]) -> str:
    """A table in Markdown that shows every text as it is."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(record: SampleRecord) -> list[Any]:
    kl = record.reverse_kl
    mean = sum(kl) / len(kl) if kl else None
    return [record.prompt, record.response, record.answer, record.reward, mean, record.finished]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    escaped = html.escape("" if value is None else str(value), quote=False).translate(MARKUP)
    return "<br>".join(escaped.splitlines())
