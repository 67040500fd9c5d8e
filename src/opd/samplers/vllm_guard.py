"""Keeps a managed server from outliving opd: `python vllm_guard.py COMMAND …` runs the command until standard input ends.

opd holds the other end of that pipe, so that it ends however opd ends, by SIGKILL too. The command has a process group of its own:
first its leader gets SIGTERM, after some seconds all of it SIGKILL. This file needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_S = 8.0
MEANT_FOR_OPD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


def main(command: list[str]) -> int:
    """Run the command; return its exit code when everything that it started is gone."""
    for number in MEANT_FOR_OPD:
        signal.signal(number, signal.SIG_IGN)
    _prctl(SET_CHILD_SUBREAPER, 1)  # orphans of the group come here, to be waited for
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_before_exec)
    threading.Thread(target=_end_with_opd, args=(child,), daemon=True).start()
    code = child.wait()
    print(f"the server ended with code {code}", flush=True)
    patience = time.monotonic() + GRACE_S / 2  # for its children to give shared memory back
    while _is_there(child.pid) and time.monotonic() < patience:
        time.sleep(0.05)
    _kill(child.pid)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return code


def _is_there(group: int) -> bool:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _end_with_opd(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    child.terminate()
    time.sleep(GRACE_S)
    _kill(child.pid)


def _before_exec() -> None:
    _prctl(SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed
    for number in MEANT_FOR_OPD:
        signal.signal(number, signal.SIG_DFL)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
