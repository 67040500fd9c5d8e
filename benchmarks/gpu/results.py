"""Rows on disk, and the report made of them. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.parts import PARTS

Verdict = Literal["", "ok", "FAIL", "skipped", "not reached"]
"""Empty for a measurement, which is neither right nor wrong."""
MANY_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one case."""

    part: str
    table: str
    case: str
    verdict: Verdict = ""
    cells: dict[str, str | float | int | None] = field(default_factory=dict)
    note: str = ""
    """Why it failed, was skipped, or was not reached."""
    seconds: float = 0.0


def append_row(path: Path, row: Row) -> None:
    """One more JSON line, on the disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of every whole line; a last line that is still being written is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [Row(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run of the command has found so far."""

    command: str
    about: Mapping[str, str]
    """Device, versions and packages of the machine."""
    rows: Sequence[Row]
    running: str = ""
    """The part that is not over yet."""

    def write(self, folder: Path, stem: str) -> None:
        """`STEM.json` and `STEM.md`, each replaced at once, so that a cut leaves a whole one."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {"command": self.command, "about": dict(self.about), "rows": [asdict(row) for row in self.rows]}
        for name, text in ((f"{stem}.json", json.dumps(document, indent=1) + "\n"), (f"{stem}.md", self.markdown())):
            beside = folder / f".{name}.part"
            beside.write_text(text, encoding="utf-8")
            beside.replace(folder / name)

    def markdown(self) -> str:
        """The report: what failed first, then every part's tables."""
        lines = [f"# opd on {self.about.get('device', 'an unknown device')}", "", f"`{self.command}`", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items() if name != "device"]
        if self.running:
            lines += ["", f"The part `{self.running}` was still running when this was written."]
        lines += ["", "## What needs a look", "", *self._remarks()]
        for part in PARTS:
            mine = [row for row in self.rows if row.part == part.name]
            if mine:
                lines += ["", f"## {part.name}", "", part.shows]
            for table in dict.fromkeys(row.table for row in mine):
                lines += ["", f"**{table}**", "", *markdown_table([row for row in mine if row.table == table])]
        return "\n".join(lines) + "\n"

    def _remarks(self) -> list[str]:
        """A line per failure; a line per reason for what did not run."""
        failed = [row for row in self.rows if row.verdict == "FAIL"]
        lines = [f"- FAIL: {row.part}, {row.table}, {row.case}: {row.note or 'see the table'}" for row in failed]
        for verdict in ("not reached", "skipped"):
            reasons: dict[tuple[str, str], list[str]] = {}
            for row in self.rows:
                if row.verdict == verdict:
                    reasons.setdefault((row.part, row.note), []).append(row.case)
            lines += [f"- {verdict}: {part}: {'; '.join(cases)}: {note}" for (part, note), cases in reasons.items()]
        return lines or ["- Nothing: every case ran, and every check held."]


def markdown_table(rows: Iterable[Row]) -> list[str]:
    """One table, a line per case; a line per quantity where those are many more than the cases."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    judged = any(row.verdict for row in rows)
    lines = [["case", *columns, *(["verdict"] if judged else [])]]
    for row in rows:
        cells = [row.case, *(shown(row.cells.get(name)) for name in columns)]
        lines.append([*cells, *([row.verdict] if judged else [])])
    if len(columns) > MANY_COLUMNS:
        lines = [list(line) for line in zip(*lines, strict=True)]
    rule = "|---|" + "---:|" * (len(lines[0]) - 1)
    written = [f"| {' | '.join(line)} |" for line in lines]
    return [written[0], rule, *written[1:]]


def shown(value: Any) -> str:
    """A cell: four significant digits of a number, text as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
