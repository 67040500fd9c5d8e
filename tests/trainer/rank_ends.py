"""Run as a program by every rank: one of them ends in the way that is named, and the others ask it something.

usage: rank_ends.py HOW
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from opd.errors import DataError, OpdError
from opd.joining import session
from opd.ranks import Ranks
from opd.trainer.together import check_same


def bad_data() -> NoReturn:
    raise DataError("prompt 3 is empty.")


def end(how: str, ranks: Ranks) -> None:
    last = ranks.rank == ranks.world - 1
    if how == "killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "a mistake" and last:
        raise RuntimeError("a mistake of ours")
    if how == "bad data" and last:
        bad_data()
    if how == "bad data everywhere":
        bad_data()
    if how == "bad data on rank 0":
        ranks.from_first(bad_data)
    if how == "another recipe":
        check_same(ranks, {"optimizer.lr": 1e-3 if last else 1e-4, "seed": 0}, "Ranks were started with other recipes")
    if how == "late":
        ranks.from_first(lambda: time.sleep(1))
    if how == "in order" and ranks.first:
        return
    while True:
        ranks.gather(how)
        time.sleep(0.01)
        if how == "late":
            return


if __name__ == "__main__":
    try:
        with session() as together:
            end(sys.argv[1], together)
    except OpdError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
    finally:
        for thread in Path("/proc/self/task").glob("*"):  # none where there is no /proc
            if "gloo" in (name := (thread / "comm").read_text()):
                print(f"a thread is left: {name}", flush=True)
