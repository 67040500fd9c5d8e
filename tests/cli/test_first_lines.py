"""The first lines of `opd train`, in processes of their own: in a pipe, and in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from worlds import settings

TIMEOUT_S = 120
NOTE_TORCH = """
import sys
class Note:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            print("IMPORTS", name, flush=True)
sys.meta_path.insert(0, Note())
from opd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def words(world: Path, run_dir: Path, **more: object) -> list[str]:
    options = {"log__progress": "auto", "train__steps": 3, "eval__every": 0, "checkpoint__every": 0}
    values = settings(world, run_dir, **{**options, **more})
    return ["train", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "COLUMNS", "FORCE_COLOR")}
    return {**kept, "TERM": "xterm-256color", **more}


def in_pipe(*argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_terminal(columns: int, *argv: str) -> str:
    """What a command writes to a terminal of this width."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    child = subprocess.Popen([sys.executable, *argv], stdout=slave, stderr=slave, stdin=slave, env=environment())
    os.close(slave)
    shown, until = b"", time.monotonic() + TIMEOUT_S
    try:
        while time.monotonic() < until:
            if select.select([master], [], [], 1.0)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError:  # Linux: the other end is closed
                    break
                if not data:
                    break
                shown += data
        assert child.wait(timeout=10) == 0, shown.decode()
    finally:
        child.kill()
        child.wait()
        os.close(master)
    return shown.decode()


def screen_lines(shown: str) -> list[str]:
    plain = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", shown)
    return [line.rstrip() for line in re.split("[\r\n]+", plain) if line.strip()]


def test_the_banner_comes_before_torch_is_imported(world, tmp_path):
    lines = in_pipe("-c", NOTE_TORCH, *words(world, tmp_path / "run")).splitlines()
    imported = next(number for number, line in enumerate(lines) if line.startswith("IMPORTS"))
    assert [line.split()[0] for line in lines[:imported]] == ["opd", "student", "teacher", "loss", "prompts", "step"]
    rest = [line for line in lines[imported:] if not line.startswith("IMPORTS")]
    assert re.fullmatch(
        r"check     \d+ findings, no warning; 0\.\d s of CPU time; opd check shows them all", rest.pop(0)
    )
    assert rest[0] == f"loading student '{world}/student' in float32 on cpu"
    assert re.fullmatch(r"  prompt │ \d+>", rest[1])
    assert rest[2] == f"loading teacher '{world}/teacher' in float32 on cpu"
    steps = [line for line in rest if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "3/3"]
    assert re.search(r"loss \S+  truncated \d+%  tokens/s [\d,]+  memory \d+\.\d GB  ETA 0:\d\d$", steps[0])


@pytest.mark.serial
def test_the_banner_is_there_in_under_a_second(world, tmp_path):
    """In seconds of CPU time, which other processes cannot take away: the wall clock of a machine to itself is the same."""
    code = "import resource; from opd.cli.banner import show_banner; from opd.config.recipe import check, words_of; show_banner(check(words_of(None, {}))); print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    _, *overrides = words(world, tmp_path / "run")
    spent = float(in_pipe("-c", code.replace("{}", repr(overrides))).splitlines()[-1])
    assert spent < 1.0


@pytest.mark.parametrize("columns", [44, 120])
def test_a_terminal_shows_banner_and_prompt_and_fits(world, tmp_path, columns):
    argv = words(world, Path("run"), log__show_samples=2)
    shown = in_terminal(
        columns,
        "-c",
        f"import os; os.chdir({str(tmp_path)!r})\n{NOTE_TORCH.replace('print', '(lambda *a, **k: 0)')}",
        *argv,
    )
    lines = screen_lines(shown)
    assert lines[0].startswith("opd") and lines[0].endswith("· run")
    text = " ".join(" ".join(lines).split())
    assert "9.7k parameters, float32, vocabulary 13" in text and "loading student" in text
    assert "prompt │" in text and "one of 12 sampled answers" in text and "answer │" in text
    assert max(map(len, lines)) <= columns, max(lines, key=len)


def test_no_banner_where_nothing_is_to_be_shown_or_the_recipe_is_wrong(world, tmp_path):
    assert in_pipe("-c", NOTE_TORCH, *words(world, tmp_path / "run", log__progress="off")).count("parameters") == 0
    argv = [sys.executable, "-c", NOTE_TORCH, "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 1 and done.stderr.startswith("error: No recipe at") and "student" not in done.stdout
    wrong = [sys.executable, "-c", NOTE_TORCH, *words(world, tmp_path / "run", train__stepz=3)]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 1 and "Unknown key 'train.stepz'" in done.stderr and "student" not in done.stdout


def test_the_banner_has_the_yellow_checks_once_and_a_red_one_refuses_the_run(world, tmp_path):
    warning = "warning: prompts.eval_path is not set, so nothing is evaluated"
    argv = words(world, tmp_path / "run", eval__every=3)
    at = argv.index("--prompts.eval_path")
    shown = in_pipe("-m", "opd.cli.main", *argv[:at], *argv[at + 2 :])
    assert shown.count(warning) == 1
    assert shown.index("check     ") < shown.index(warning) < shown.index("loading student")
    argv = [sys.executable, "-m", "opd.cli.main", *words(world, tmp_path / "other", rollout__max_new_tokens=100_000)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 1 and "loading student" not in done.stdout
    assert re.match(r"error: prompt \d+ has \d+ tokens; with max_new_tokens=100000", done.stderr), done.stderr
    assert not (tmp_path / "other").exists()
