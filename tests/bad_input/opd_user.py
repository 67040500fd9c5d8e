"""How a user meets the library: words on a command line in, an exit code and two streams out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import main

EXPLAINED = 1
WRONG_COMMAND_LINE = 2


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def refuses(self, *fragments: str, code: int = EXPLAINED) -> None:
        """One error line, without a traceback, that holds every fragment: what is wrong, why, and what to do."""
        assert self.code == code, f"exit code {self.code}\n{self.out}{self.err}"
        assert "Traceback" not in self.err
        assert self.message, self.err
        missing = [fragment for fragment in fragments if fragment not in self.message]
        assert not missing, f"{missing} not in: {self.message}"

    @property
    def message(self) -> str:
        return self.err.rpartition("error: ")[2].strip()


@dataclass(frozen=True)
class Desk:
    """The session's models, prompts and recipe."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "recipe.yaml")

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"


class User:
    def __init__(self, desk: Desk, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.desk = desk
        self.folder = folder
        self.run_dir = folder / "run"
        self._capsys = capsys

    def opd(self, *words: str) -> Outcome:
        """`opd WORDS…` in this process."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def train(self, *words: Any, **overrides: Any) -> Outcome:
        """The base recipe into this user's run folder; `student__model=x` is `--student.model x`."""
        flags = [word for name, value in overrides.items() for word in (f"--{name.replace('__', '.')}", str(value))]
        return self.opd("train", self.desk.recipe, "--run_dir", str(self.run_dir), *map(str, words), *flags)

    def shell(
        self, *words: str, module: str = "opd.cli.main", preexec: Callable[[], None] | None = None, timeout: float = 120
    ) -> Outcome:
        """`opd WORDS…` in a process of its own."""
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, preexec_fn=preexec)  # noqa: PLW1509
        return Outcome(done.returncode, done.stdout, done.stderr)

    def train_in_shell(self, *words: Any, preexec: Callable[[], None] | None = None) -> Outcome:
        return self.shell("train", self.desk.recipe, "--run_dir", str(self.run_dir), *map(str, words), preexec=preexec)

    def writes(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def writes_prompts(self, *rows: dict[str, Any], name: str = "own.jsonl") -> str:
        return self.writes(name, "".join(json.dumps(row) + "\n" for row in rows))

    def files(self) -> dict[str, bytes]:
        """Everything in the run folder but the lock."""
        return contents(self.run_dir)


def contents(folder: Path, leave_out: Sequence[str] = (".lock",)) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
