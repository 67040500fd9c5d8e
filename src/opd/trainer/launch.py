"""How a run was started, by whom and on what: the facts of about.json that no recipe holds."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from opd.config import Config
from opd.config.recipe import to_dict
from opd.doctor.read_prompts import ReadPrompts
from opd.models import resolve_device
from opd.remote.secrets import without_secrets
from opd.reporting.about import About
from opd.reporting.banner import objective_words, teacher_names

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("opd", "torch", "transformers", "peft", "vllm", "triton")
GIT_TIMEOUT_S = 5.0


def command_line() -> str:
    """The words that started this process, without the folder of the program and without secrets."""
    first, *rest = sys.argv or [""]
    return shlex.join([Path(first).name, *without_secrets(rest)]) if first else ""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run was started."""

    command: str = field(default_factory=command_line)
    folder: Path = field(default_factory=Path.cwd)
    """The recipe's folder, whose commit says what was run."""
    announced: bool = False
    """The banner has been printed."""
    said: frozenset[str] = frozenset()
    """Warnings that were printed with it."""
    read: ReadPrompts | None = None
    """The prompts, where the checks that were shown with it have read them."""


def about_run(config: Config, launch: Launch, *, started: str = "") -> About:
    """What this run is; `started` is when a resumed one began."""
    settings = to_dict(config)
    prompts = config.prompts
    held_out = f", held out: {prompts.eval_path}" if prompts.eval_path and config.eval.every else ""
    return About(
        student=config.student.model,
        teacher=" + ".join(teacher_names(settings)),
        objective=objective_words(settings),
        data=prompts.path + held_out,
        device=device_words(resolve_device(config.student.device)),
        started=started or datetime.now().astimezone().isoformat(timespec="seconds"),
        command=launch.command,
        commit=commit_of(launch.folder),
        versions=versions(),
        hardware=hardware_words(),
    )


def device_words(device: torch.device) -> str:
    """Such as "cuda:0 (NVIDIA H100 80GB HBM3)", or "cpu (8 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"


def hardware_words() -> str:
    """Such as "AMD EPYC 9654 96-Core Processor, 16 cores, 126 GiB; 8 × NVIDIA H100 80GB HBM3"; cores are those that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [_processor(), f"{cores} core{'' if cores == 1 else 's'}"]
    with suppress(OSError, ValueError, AttributeError):  # not every system tells
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    found = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    cards = [f"{count} × {name}" if count > 1 else name for name, count in found.items()]
    return "; ".join([", ".join(part for part in parts if part), *cards])


def _processor() -> str:
    """The processor's name; its architecture where Linux does not tell."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def commit_of(folder: Path) -> str:
    """The commit that a folder is at, with "+" where something in it is changed; "" outside of a repository, or without git."""
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return ""
    return f"{commit}+" if _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".") else commit


def _git(folder: Path, *words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run does, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def memory_words(device: Any) -> str:
    """Memory in use at most: of the GPU, or of this process where it trains on the CPU."""
    if getattr(device, "type", "cpu") == "cuda":
        return f"GPU {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB"
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return ""
    return f"memory {pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
