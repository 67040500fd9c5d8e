"""`apply_patch.sh` killed at any moment: the next run repairs, and nothing of the first is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from patch_trees import NEWEST, QUIET, SCRIPT, git, make_checkout, make_tree, program, script, small_files, state

WORKERS = "verl/workers/engine_workers.py"
KILLS = 3
"""Of each way, and of the repair after each."""
WITHOUT_GIT = {"OPD_PATCH_WITHOUT_GIT": "1"}
TOOLS = ("cp", "find", "git", "mkdir", "mv", "patch", "rm", "rmdir")
"""Programs that the installer changes things with."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "a verl checkout", small_files(NEWEST))


def waiting_python(folder: Path) -> tuple[Path, Path]:
    """A Python that never ends the tests after applying, and the file that it makes when it begins."""
    started = folder / "started"
    return program(folder / "python", f'[ "$1" = -c ] && exit 0\ntouch "{started}"\nsleep 60'), started


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize("way", ["", "--am"])
def test_a_run_that_was_killed_is_repaired_by_the_next(checkout: Path, tmp_path: Path, way: str):
    python, started = waiting_python(tmp_path)
    before, head = state(checkout), git(checkout, "rev-parse", "HEAD")
    words = ["bash", str(SCRIPT), *way.split(), "--python", str(python), str(checkout)]
    with subprocess.Popen(words, env={**os.environ, **QUIET}, start_new_session=True, stdout=subprocess.DEVNULL) as run:
        wait_for(started)
        busy = script(checkout)
        assert busy.returncode == 1 and f"another apply_patch.sh is at work in {checkout}" in busy.stderr
        os.killpg(run.pid, signal.SIGKILL)
    assert state(checkout) != before
    (checkout / WORKERS).write_text("half a file", encoding="utf-8")
    done = script("--check", checkout)
    assert done.returncode == 1 and "interrupted half way" in done.stderr
    done = script(checkout)
    assert done.returncode == 0, done.stderr
    assert "restoring the tree" in done.stdout and "Applied" in done.stdout
    assert git(checkout, "rev-parse", "HEAD") == head
    assert script("--reverse", checkout).returncode == 0
    assert state(checkout) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_restores_the_tree(tmp_path: Path, number: signal.Signals, code: int):
    tree = make_tree(tmp_path / "a verl tree", small_files(NEWEST))
    python, started = waiting_python(tmp_path)
    before = state(tree)
    words = ["bash", str(SCRIPT), "--python", str(python), str(tree)]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}

    def heard() -> None:
        """A shell cannot trap what it was started to ignore, as under nohup."""
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(words, preexec_fn=heard, **quietly) as run:
        wait_for(started)
        os.killpg(run.pid, number)
        assert run.wait(timeout=30) == code
    assert state(tree) == before


def test_a_reader_that_goes_away_restores_the_tree(checkout: Path):
    """`apply_patch.sh … | head -0`."""
    before = state(checkout)
    read, write = os.pipe()
    os.close(read)
    words = ["bash", str(SCRIPT), "--no-verify", str(checkout)]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False, env={**os.environ, **QUIET})
    os.close(write)
    assert done.returncode == 141 and b"as it was before" in done.stderr
    assert state(checkout) == before


def deadly_tools(folder: Path) -> Path:
    """`TOOLS` that count their calls in $CALLS, and kill everything instead of the call number $LAST."""
    folder.mkdir()
    for name in TOOLS:
        real = shutil.which(name)
        count = 'read -r n <"$CALLS"; n=$((n + 1)); echo "$n" >"$CALLS"; [ "$n" -ne "$LAST" ] || kill -9 0'
        program(folder / name, f'{count}\nexec {real} "$@"')
    return folder


def interrupted(tools: Path, last: int, *words: str | Path, **env: str) -> tuple[int, int]:
    """Run apply_patch.sh up to that call of a tool: its exit code, and the calls that were made."""
    calls = tools / "calls"
    calls.write_text("0\n")
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), "--no-verify", *map(str, words)],
        env={**os.environ, **QUIET, "PATH": path, "CALLS": str(calls), "LAST": str(last), **env},
        start_new_session=True,
        capture_output=True,
        check=False,
    )
    return done.returncode, int(calls.read_text())


WAYS = [
    pytest.param("", {}, id="git-apply"),
    pytest.param("--3way", {}, id="3way"),
    pytest.param("--am", {}, id="am"),
    pytest.param("--reverse", {}, id="reverse"),
    pytest.param("", WITHOUT_GIT, id="patch"),
    pytest.param("--reverse", WITHOUT_GIT, id="patch-reverse"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "tool"), WAYS)
def test_a_kill_between_any_two_steps_is_repaired_though_the_repair_is_killed_too(
    way: str, tool: dict[str, str], tmp_path: Path
):
    """Which steps: drawn; set OPD_EVERY_KILL=1 for all of them."""
    tools = deadly_tools(tmp_path / "tools")
    pristine = make_checkout(tmp_path / "pristine", small_files(NEWEST))
    before, head = state(pristine), git(pristine, "rev-parse", "HEAD")
    if way == "--reverse":
        assert script(pristine).returncode == 0

    def copy(name: str) -> Path:
        return Path(shutil.copytree(pristine, tmp_path / name / "a verl", symlinks=True))

    words = way.split()
    code, calls = interrupted(tools, 0, *words, copy("whole"), **tool)
    assert code == 0
    draw = random.Random(way)
    every = range(1, calls + 1)
    drawn = {*draw.sample(every, KILLS), calls - 1}  # near the end, a reversal has removed folders
    for last in every if os.environ.get("OPD_EVERY_KILL") else sorted(drawn):
        tree = copy(f"killed {last}")
        assert interrupted(tools, last, *words, tree, **tool)[0] == -signal.SIGKILL
        again = draw.randrange(1, calls)
        interrupted(tools, again, *words, tree, **tool)
        told = f"{way or 'apply'} killed before call {last} of {calls}, the next run before call {again}"
        done = script(*words, tree, **tool)
        assert done.returncode == 0, f"{told}: {done.stderr}"
        if way != "--reverse":
            assert (tree / "ON_POLICY_DISTILLATION.md").is_file(), told
            undone = script("--reverse", tree, **tool)
            assert undone.returncode == 0, f"{told}: {undone.stderr}"
        assert state(tree) == before, told
        if way == "--am":
            git(tree, "reset", "--quiet", "--hard", head.strip())
        assert not git(tree, "status", "--porcelain"), told
        shutil.rmtree(tree)
