"""What a run is, and how far it is: `about.json`, written once when it starts, and `state.json`, replaced as it goes on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from opd.reporting.files import ABOUT_FILE, STATE_FILE, explain_os_errors, strict_json, write_atomically

StateName = Literal["loading", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class About:
    """One run in the words that a reader of its report needs. Empty texts are unknown."""

    student: str = ""
    teacher: str = ""
    """A name, several names joined by " + ", or a URL."""
    objective: str = ""
    """Such as "reverse KL, whole vocabulary"."""
    data: str = ""
    device: str = ""
    started: str = ""
    """ISO 8601 with its time zone."""
    command: str = ""
    commit: str = ""
    """Commit of the folder that the recipe is in, with "+" where it has changes that are not committed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package → version: opd, torch, transformers, …"""
    hardware: str = ""
    """Processor, cores, memory and GPUs of the machine."""


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a run is."""

    name: StateName
    step: int = 0
    """Updates completed."""
    steps: int = 0
    """Updates that the recipe asks for."""
    why: str = ""
    """Of a run that stopped or failed: one sentence."""
    updated: float = 0.0
    """Seconds since 1970."""
    host: str = ""
    pid: int = 0

    @property
    def alive(self) -> bool:
        """False for a run that says it goes on, on this host, though its process is gone."""
        if self.name not in ("loading", "running") or self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True


def write_about(run_dir: str | Path, about: About) -> None:
    """Raises RunFolderError where the folder cannot be written."""
    _write(Path(run_dir) / ABOUT_FILE, asdict(about))


def write_state(run_dir: str | Path, name: StateName, step: int, steps: int, why: str = "") -> None:
    """Replace state.json, with this process and the time. Raises RunFolderError where the folder cannot be written."""
    state = State(
        name=name, step=step, steps=steps, why=why, updated=time.time(), host=socket.gethostname(), pid=os.getpid()
    )
    _write(Path(run_dir) / STATE_FILE, asdict(state))


def read_about(run_dir: str | Path) -> About | None:
    """None for a run of an older version, and where the file is no record of one."""
    return _read(Path(run_dir) / ABOUT_FILE, About)


def read_state(run_dir: str | Path) -> State | None:
    """None for a run of an older version, and where the file is no record of one."""
    return _read(Path(run_dir) / STATE_FILE, State)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode("utf-8", "backslashreplace"))


def _read(path: Path, kind: Any) -> Any:
    with explain_os_errors("read", path):
        if not path.exists():
            return None
        raw = path.read_bytes()
    try:
        values = json.loads(raw)
        return kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})
    except (ValueError, TypeError):
        return None
