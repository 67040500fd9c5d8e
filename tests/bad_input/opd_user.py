"""How a user meets the library: words on a command line in, an exit code and two streams out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import main
from opd.testing import save_model

EXPLAINED = 1
WRONG_COMMAND_LINE = 2


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        return self.err[self.err.index("error: ") :].removeprefix("error: ").strip()

    def refuses(self, *fragments: str, code: int = EXPLAINED) -> None:
        """One error, without a traceback, that holds every fragment: what is wrong, why, and what to do."""
        assert self.code == code, f"exit code {self.code}\n{self.out}{self.err}"
        assert "Traceback" not in self.err
        assert sum(line.startswith("error: ") for line in self.err.splitlines()) == 1, self.err
        missing = [fragment for fragment in fragments if fragment not in self.message]
        assert not missing, f"{missing} not in: {self.message}"

    def succeeds(self) -> None:
        assert self.code == 0, f"exit code {self.code}\n{self.out}{self.err}"


@dataclass(frozen=True)
class Desk:
    """The session's models, prompts, recipe, and one finished run of it."""

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

    @property
    def finished_run(self) -> Path:
        return self.folder / "finished"


class User:
    def __init__(self, desk: Desk, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.desk = desk
        self.folder = folder
        self.run_dir = folder / "run"
        self._capsys = capsys

    def opd(self, *words: Any) -> Outcome:
        """`opd WORDS…` in this process."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def train(self, *words: Any, **overrides: Any) -> Outcome:
        """The desk's recipe into this user's run folder; `student__model=x` is `--student.model x`."""
        return self.opd("train", self.desk.recipe, *words, "--run_dir", self.run_dir, *_flags(overrides))

    def shell(self, *words: Any, preexec: Callable[[], None] | None = None) -> Outcome:
        """`opd WORDS…` in a process of its own."""
        command = [sys.executable, "-m", "opd.cli.main", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, preexec_fn=preexec)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def train_in_shell(self, *words: Any, preexec: Callable[[], None] | None = None, **overrides: Any) -> Outcome:
        return self.shell(
            "train", self.desk.recipe, *words, "--run_dir", self.run_dir, *_flags(overrides), preexec=preexec
        )

    def writes(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def writes_prompts(self, *rows: dict[str, Any], name: str = "own.jsonl") -> str:
        return self.writes(name, "".join(json.dumps(row) + "\n" for row in rows))

    def saves(self, name: str, model: Any, tokenizer: Any) -> str:
        return save_model(model, tokenizer, self.folder / name)

    def copies(self, model: Path, name: str) -> Path:
        return Path(shutil.copytree(model, self.folder / name))

    def has_finished_run(self) -> dict[str, bytes]:
        """The desk's two-step run lies in the run folder; returns its files."""
        shutil.copytree(self.desk.finished_run, self.run_dir)
        return self.files()

    def has_run_killed_in_step_2(self) -> dict[str, bytes]:
        """What a kill between the two checkpoints leaves."""
        self.has_finished_run()
        shutil.rmtree(self.run_dir / "checkpoints" / "step-00000002")
        shutil.rmtree(self.run_dir / "student")
        (self.run_dir / "report.html").unlink()
        return self.files()

    def files(self) -> dict[str, bytes]:
        """Everything in the run folder but the lock."""
        paths = (path for path in sorted(self.run_dir.rglob("*")) if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(self.run_dir)): path.read_bytes() for path in paths}


def _flags(overrides: dict[str, Any]) -> list[str]:
    return [word for name, value in overrides.items() for word in (f"--{name.replace('__', '.')}", str(value))]
