"""`opd train --devices N`: N processes of this machine that train together. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from opd.errors import ConfigError
from opd.ranks import STARTED_BY

FLAG = "--devices"
GRACE_S = 30.0  # for ranks to end by themselves once one has ended
POLL_S = 0.1
SIGNALLED = 128


def split_devices(args: Sequence[str]) -> tuple[int, list[str]]:
    """(devices, the other words); 1 where nothing is said. Raises ConfigError for what is no count."""
    words = list(args)
    given = [i for i, word in enumerate(words) if word.split("=")[0] == FLAG]
    if not given:
        return 1, words
    place = given[0]
    taken = 1 if "=" in words[place] else 2
    value = words[place].partition("=")[2] if taken == 1 else "".join(words[place + 1 : place + 2])
    if len(given) > 1 or not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{FLAG} takes the number of processes, one for each GPU, once: {FLAG} 2. It has {value!r}.")
    return int(value), [*words[:place], *words[place + taken :]]


def started_elsewhere(environment: Mapping[str, str]) -> bool:
    """True in a process of torchrun's."""
    return int(environment.get("WORLD_SIZE", 1)) > 1 and STARTED_BY not in environment


def launch(count: int, words: Sequence[str]) -> int:
    """Run `opd train` with these words in `count` processes; the exit code of the first, or of another that failed. A signal goes to
    rank 0, which ends all. Where one is killed, it is named, and the others have GRACE_S seconds."""
    with tempfile.TemporaryDirectory(prefix="opd-ranks-") as folder:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = {
            "OMP_NUM_THREADS": str(max(1, cores // count)),
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            STARTED_BY: str(Path(folder) / "store"),
        }
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with _forwarding(ranks):
                for rank in range(count):
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "opd", "train", *words],
                            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
                        )
                    )
                return _wait(ranks)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    until: float | None = None
    told: set[int] = set()
    killed = False
    while None in [process.poll() for process in ranks]:
        for rank, process in enumerate(ranks):
            if process.returncode is None or rank in told:
                continue
            told.add(rank)
            until = until or time.monotonic() + GRACE_S
            if process.returncode < 0 and not killed:
                name = signal.Signals(-process.returncode).name
                print(f"error: rank {rank} was ended by {name}; the others end.", file=sys.stderr, flush=True)
        if until is not None and time.monotonic() > until:
            killed = True
            for process in ranks:
                with suppress(ProcessLookupError):
                    process.kill()
        time.sleep(POLL_S)
    codes = [process.returncode for process in ranks]
    code = next((code for code in codes if code), 0)
    return code if code >= 0 else SIGNALLED - code


@contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals go to rank 0."""

    def forward(number: int, _frame: FrameType | None) -> None:
        if ranks and ranks[0].poll() is None:
            ranks[0].send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
