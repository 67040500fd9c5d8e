"""`opd runs`: a table of the runs below a folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from opd.cli.options import Command, Option, read
from opd.errors import ConfigError, RunFolderError, printable

if TYPE_CHECKING:
    from opd.reporting.listing import Listed

COMMAND = Command(
    usage="opd runs [DIR] [--json]",
    about="""Lists the runs in DIR and below, the one with the latest news first: what is trained on what, how far it is, its last evaluation.
Without DIR it looks in runs/, or here where there is no such folder. "crashed" is a run that says it goes on, though its process is gone.""",
    options=(Option(name="--json", kind="flag", help="print one JSON document"),),
)
TITLES = ("run", "student ← teacher", "objective", "state", "step", "last evaluation", "when (UTC)")
LONGEST_CELL = 40  # characters; JSON has the whole text


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(COMMAND.help)
        return 0
    given = read(COMMAND, args)
    if len(given.words) > 1:
        raise ConfigError(f"Give one folder, not {len(given.words)}: {COMMAND.usage}")
    root = Path(given.words[0]) if given.words else Path("runs") if Path("runs").is_dir() else Path()
    if not root.is_dir():
        raise RunFolderError(f"There is no folder '{root}'. Give the folder that your runs are in: {COMMAND.usage}")
    from opd.reporting.files import strict_json
    from opd.reporting.listing import list_runs

    found = list_runs(root)
    if given.get("json"):
        rows = [{**asdict(one), "folder": str(one.folder)} for one in found]
        print(json.dumps(strict_json(rows), indent=2, ensure_ascii=False))
        return 0
    if not found:
        print(f"There are no runs in '{printable(str(root))}' or below.", file=sys.stderr)
        return 0
    width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else None
    for line in table([cells(one, root) for one in found]):
        print(line if width is None or len(line) <= width else line[: width - 1] + "…")
    return 0


def cells(one: Listed, root: Path) -> tuple[str, ...]:
    """One row of the table."""
    name = one.folder.relative_to(root).as_posix() if one.folder != root else one.folder.resolve().name
    teachers = " + ".join(map(_short, one.teacher.split(" + ")))
    models = f"{_short(one.student)} ← {teachers}" if one.teacher else _short(one.student)
    why = f": {one.why}" if one.why else ""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.updated)) if one.updated else ""
    found = (name, models, one.objective, one.state + why, _steps(one), _evaluation(one), when)
    return tuple(
        printable(cell) if len(cell) <= LONGEST_CELL else printable(cell)[: LONGEST_CELL - 1] + "…" for cell in found
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows below their titles, in columns; a column that is empty in every row is left out."""
    lines = [TITLES, *rows]
    kept = [i for i in range(len(TITLES)) if any(row[i] for row in rows)]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return ["  ".join(f"{line[i]:<{widths[i]}}" for i in kept).rstrip() for line in lines]


def _short(model: str) -> str:
    """The last part of a path; hub names and addresses are short already."""
    return model.rstrip("/").rpartition("/")[2] if model.count("/") > 1 and "://" not in model else model


def _steps(one: Listed) -> str:
    return f"{one.step:,}" if one.steps is None else f"{one.step:,} of {one.steps:,}"


def _evaluation(one: Listed) -> str:
    accuracy, kl = one.evaluation.get("accuracy"), one.evaluation.get("reverse_kl")
    parts = [] if accuracy is None else [f"{accuracy:.1%}"]
    parts += [] if kl is None else [f"KL {kl:#.3g}"]
    at = f" at {one.evaluated_at:,}" if parts and one.evaluated_at not in (None, one.step) else ""
    return ", ".join(parts) + at
