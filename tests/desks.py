"""Runs, models and processes for the tests of commands that use models."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from opd.config.recipe import build, merge
from opd.trainer.run import train
from worlds import make_world, settings

TIMEOUT_S = 120
MAX_CPU_S = 1.2  # 0.3 on an idle machine; with torch and transformers it is 3.5 and more
WATCHED = """
import sys
from opd.cli.main import main
code = main(sys.argv[1:])
print("code", code, "heavy", *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


@dataclass(frozen=True)
class Answer:
    """What a command printed and took, in a process of its own."""

    last: str
    """Such as "code 1 heavy", followed by the heavy packages that were imported."""
    out: str
    err: str
    cpu_s: float


def answered(folder: Path, *words: str) -> Answer:
    """The answer of `opd WORDS`, run in `folder`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    *out, last = done.stdout.splitlines()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(last, "\n".join(out), done.stderr, used)


def check_refusal(folder: Path, words: Sequence[str], said: str) -> None:
    """The command refuses at once, with these words and no heavy import."""
    answer = answered(folder, *words)
    assert said in answer.err
    assert (answer.last, answer.out) == ("code 1 heavy", "")
    assert answer.err.count("\n") == 1, "one line"
    assert answer.cpu_s < MAX_CPU_S


def make_desk(folder: Path) -> Path:
    """A world; recipe.yaml; `run`, a finished run of it with checkpoints after 2 and 4 of 4 steps; and `lora`, the same with adapters."""
    make_world(folder)
    more = {"train__steps": 4, "eval__every": 2, "eval__reward": "regex:^[0-4]", "eval__extra_temperatures": [0.0]}
    recipe = merge({}, settings(folder, folder / "run", **more))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(build(recipe))
    adapted = {"run_dir": str(folder / "lora"), "student.lora.rank": 4, "optimizer.lr": 0.05}
    train(build(merge(recipe, adapted)))
    return folder
