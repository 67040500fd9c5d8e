"""A process with everything it starts, under a time limit: Ray leaves daemons behind, and verl waits for ever when a server dies."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.5
MARK = "OPD_LAUNCH"
"""An environment variable that all processes of one launch inherit; Ray's workers overwrite theirs, its daemons do not."""
NOT_INHERITED = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                 "MASTER_ADDR", "MASTER_PORT", "DIST_INIT_METHOD")  # fmt: skip
"""They would join a cluster or a process group that is already there, or find the addresses of one that is gone."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that is over, and all that it had started."""

    code: int | None
    """None when the limit ended it."""
    seconds: float


def launch(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    limit: float,
    folder: Path | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """Run it with both streams in `log`, calling `watch` now and then; nothing of it is left when this returns or raises."""
    mark, began = uuid.uuid4().hex, time.monotonic()
    family: set[psutil.Process] = set()
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who then end the rest
        )
    root = psutil.Process(process.pid)
    family.add(root)
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            family |= _children(root)
            watch()
            time.sleep(POLL_SECONDS)
        code = process.poll()
    finally:
        _end(family | _children(root) | _marked(mark), mark)
        process.wait()
    watch()
    return Ended(code=code, seconds=time.monotonic() - began)


@contextmanager
def cpu_environment(metrics: Path) -> Iterator[dict[str, str]]:
    """The environment of a run of verl on this machine's CPU, with a home of its own that is removed afterwards.

    verl's file logger writes to `metrics`. `ray_folder(env)` is where Ray goes.
    """
    home = tempfile.mkdtemp(
        prefix="opd", dir="/tmp"
    )  # Ray's sockets are in it, and their paths may have 107 characters
    own = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    try:
        yield {
            **own,
            "HOME": home,
            "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HF_HUB_OFFLINE": "1",
            "HYDRA_FULL_ERROR": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "VERL_PLATFORM": "cpu",
        }
    finally:
        shutil.rmtree(home, ignore_errors=True)


def ray_folder(env: Mapping[str, str]) -> str:
    """The folder of Ray's sockets and logs."""
    return env["HOME"]


def _children(root: psutil.Process) -> set[psutil.Process]:
    try:
        return set(root.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _marked(mark: str) -> set[psutil.Process]:
    """Processes that lost their parent but still carry the mark."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.add(process)
    return found


def _end(family: set[psutil.Process], mark: str) -> None:
    """Kill them, and once more what they started meanwhile."""
    for generation in (family, _marked(mark)):
        for process in generation:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil refuses a number that another process has got since
        psutil.wait_procs(generation, timeout=5.0)


PREFIX = re.compile(r"^((?:\x1b\[\d+m)*\([^()]*pid=\d+[^()]*\)(?:\x1b\[\d+m)* ?)?(.*)$")
"""Ray's prefix of a worker's line, and the line."""
FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
RAISED = re.compile(r"^(?P<kind>(?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?:\([\w.]+\))?(?:: .*)?$")
FRAME_LINES = 6
"""A frame of a traceback, from its file to its last line."""
SHOWN_LINES = 8
WRAPPERS = ("ray.exceptions.", "hydra.errors.")
"""They quote the error that ended them, which has its own line."""


def first_error(text: str) -> str | None:
    """The first exception that a log shows a traceback of: its message, and where it was raised. None if there is none."""
    streams: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(text.splitlines()):
        found = PREFIX.match(line)
        who, said = (found[1] or "", found[2]) if found else ("", line)
        streams.setdefault(who, []).append((number, said.rstrip()))
    errors = sorted(error for stream in streams.values() for error in _errors(stream))
    return errors[0][2] if errors else None


def _errors(stream: Sequence[tuple[int, str]]) -> Iterator[tuple[bool, int, str]]:
    """(whether it only wraps another, line of the log, what to tell) of every exception that one process shows."""
    lines = [line for _, line in stream]
    for at, (number, line) in enumerate(stream):
        raised = RAISED.match(line)
        frames = [found for found in map(FRAME.match, lines[max(0, at - FRAME_LINES) : at]) if found]
        if raised is None or not frames or not lines[at - 1].startswith(" "):
            continue
        more = itertools.takewhile(lambda text: text and not text.startswith(AFTER), lines[at + 1 : at + SHOWN_LINES])
        place = f"raised in {frames[-1]['file']}, line {frames[-1]['line']}"
        yield raised["kind"].startswith(WRAPPERS), number, "\n".join([line, *more, place])


AFTER = ("Traceback", "Error executing", "During handling", "The above", "ray.")
