"""Trees of verl from its releases on the package index, and the committed patches beside them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

from tools.verl_patch.builder import FILES, PATCHES
from tools.verl_patch.release import read_release

SCRIPT = PATCHES / "apply_patch.sh"
VERSIONS = (PATCHES / FILES).read_text(encoding="utf-8").splitlines()[0].split()[2:]
NEWEST = VERSIONS[-1]
QUIET = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "LC_ALL": "C"}


@cache
def release(version: str) -> dict[str, bytes]:
    """Path → content. Downloaded once into the cache of `python -m tools.verl_patch build`."""
    return read_release(version)


@cache
def touched() -> tuple[tuple[str, str], ...]:
    """(new or changed, path) of every file in the patch."""
    lines = (PATCHES / FILES).read_text(encoding="utf-8").splitlines()[1:]
    return tuple((line.split()[0], line.split()[2]) for line in lines)


def small_files(version: str) -> dict[str, bytes]:
    """The files that the patch changes, the version, and a few that it leaves alone."""
    held = release(version)
    wanted = {path for kind, path in touched() if kind == "changed"} | {
        "verl/version/version",
        "verl/__init__.py",
    }
    others = sorted(path for path in held if path.startswith("verl/trainer/ppo/") and path.endswith(".py"))[:6]
    return {path: held[path] for path in sorted(wanted | set(others))}


def make_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def make_checkout(folder: Path, files: dict[str, bytes]) -> Path:
    """A git checkout with one commit of these files."""
    make_tree(folder, files)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "config", "user.name", "somebody")
    git(folder, "config", "user.email", "somebody@example.invalid")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "verl")
    return folder


def program(path: Path, text: str) -> Path:
    """An executable bash script."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def git(folder: Path, *words: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False, env={**os.environ, **QUIET}
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def script(*words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """apply_patch.sh; its tests after applying are left out unless --python is among the words."""
    options = [] if "--python" in words else ["--no-verify"]
    return subprocess.run(
        ["bash", str(SCRIPT), *options, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, **QUIET, **env},
    )


def state(folder: Path) -> dict[str, str]:
    """Hash and mode of every file, and every folder; git's own folder left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == ".git" or name.startswith(".git/"):
            continue
        found[name] = (
            "folder" if path.is_dir() else f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        )
    return found
