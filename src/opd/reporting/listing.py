"""The runs below a folder, each in one line: what is trained on what, how far it is, and its last evaluation."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.errors import OpdError
from opd.reporting.about import State, read_about, read_state
from opd.reporting.configuration import parsed
from opd.reporting.files import CONFIG_FILE, EVAL_FILE, METRICS_FILE, STATE_FILE, SUMMARY_FILE
from opd.reporting.header import from_config, spelled

DEEPEST = 5
"""Levels of folders below the first that are looked at."""
TAIL_BYTES = 1 << 17
"""Bytes at the end of metrics.jsonl that are searched for the last evaluation before the whole file is."""
SILENT_S = 3600.0
"""Seconds without news after which a run on another machine is not simply "running"."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run."""

    folder: Path
    student: str = ""
    teacher: str = ""
    objective: str = ""
    state: str = ""
    """loading, running, finished, stopped, failed, crashed, or unfinished where no state was recorded."""
    why: str = ""
    """Of a run that stopped or failed, and of one that has been silent for long."""
    step: int = 0
    steps: int | None = None
    evaluated_at: int | None = None
    """Step of the student's last evaluation."""
    evaluation: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    updated: float = 0.0
    """Seconds since 1970."""


def list_runs(root: Path) -> list[Listed]:
    """Every run in `root` and below, the one with the latest news first. Links to folders are not followed."""
    return sorted((read_listed(folder) for folder in run_folders(root)), key=lambda one: -one.updated)


def run_folders(root: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Folders that training wrote to. Nothing is looked for inside one, nor in hidden folders and those that opd eval wrote."""
    names = _names(root)
    if EVAL_FILE in names:
        return
    if CONFIG_FILE in names and {METRICS_FILE, STATE_FILE} & names.keys():
        yield root
        return
    for name in sorted(names) if depth else ():
        if names[name] and not name.startswith("."):
            yield from run_folders(root / name, depth - 1)


def read_listed(folder: Path) -> Listed:
    """One run, as far as its files can be read."""
    about, state = _or_none(read_about, folder), _or_none(read_state, folder)
    config = _config(folder) if about is None or state is None else {}
    about = about or from_config(config)
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    evaluation, last_step = last_records(folder / METRICS_FILE)
    name, why = _state(folder, state)
    return Listed(
        folder=folder,
        student=about.student,
        teacher=about.teacher,
        objective=about.objective,
        state=name,
        why=why,
        step=last_step if state is None else state.step,
        steps=state.steps if state is not None and state.steps else steps,
        evaluated_at=None if evaluation is None else evaluation.get("step"),
        evaluation={} if evaluation is None else dict(evaluation.get("metrics") or {}),
        updated=_updated(folder, state),
    )


def last_records(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The student's last evaluation, and the number of updates that are recorded."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            lines = stream.read().splitlines()
            if size > TAIL_BYTES and _last_evaluation(lines) is None:
                stream.seek(0)
                lines = stream.read().splitlines()
    except OSError:
        return None, 0
    steps = (r["step"] + 1 for r in map(_record, reversed(lines)) if r.get("kind") == "step")
    return _last_evaluation(lines), next(steps, 0)


def _last_evaluation(lines: Sequence[bytes]) -> dict[str, Any] | None:
    records = (_record(line) for line in reversed(lines) if b'"eval"' in line)
    return next((r for r in records if (r.get("kind"), r.get("who")) == ("eval", "student")), None)


def _record(line: bytes) -> dict[str, Any]:
    """A line cut short, at either end of what was read, holds nothing."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}


def _state(folder: Path, state: State | None) -> tuple[str, str]:
    if state is None:
        return ("finished" if (folder / SUMMARY_FILE).exists() else "unfinished"), ""
    if not state.alive:
        return "crashed", "its process is gone"
    silent = time.time() - state.updated
    if state.name in ("loading", "running") and silent > SILENT_S:
        return state.name, f"no word for {spelled(silent)}"
    return state.name, state.why


def _updated(folder: Path, state: State | None) -> float:
    if state is not None and state.updated:
        return state.updated
    times = [path.stat().st_mtime for name in (METRICS_FILE, CONFIG_FILE) if (path := folder / name).exists()]
    return max(times, default=0.0)


def _names(folder: Path) -> dict[str, bool]:
    """What is in a folder, by name: True for a folder that is no link. Nothing of one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError:
        return {}


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return parsed((folder / CONFIG_FILE).read_text("utf-8", errors="replace")) or {}
    except OSError:
        return {}


def _or_none(read: Any, folder: Path) -> Any:
    try:
        return read(folder)
    except OpdError:
        return None
