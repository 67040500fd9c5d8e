"""Run as a program: kill −9 one rank of a run, or all of them, again and again at random moments; resume it, and say how it ended.

usage: kill_ranks.py WORLD RESULTS PARALLEL KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsdp2_cases import import_all
from fsdp2_runs import MINUTE, newest, run, train
from rank_cases import exit_codes, start

torch.set_num_threads(1)
RANKS = 2
PHASES = 3  # different newest checkpoints that the kills must have hit; a few more kills are made until they have
VICTIMS: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 1))
SHARE = 0.7
"""Of the time of an undisturbed run, in which a kill falls once the ranks have met."""
VALUES: dict[str, object] = {
    "train__steps": 12,
    "eval__every": 0,
    "checkpoint__every": 1,
    "optimizer__schedule": "cosine",
}


def changed(run_dir: Path) -> int:
    """When the run last wrote down its state, in nanoseconds."""
    state = run_dir / "state.json"
    return state.stat().st_mtime_ns if state.exists() else 0


def kill_again_and_again(world: Path, results: Path, parallel: str, kills: int) -> dict[str, Any]:
    values = {**VALUES, "train__parallel": parallel}
    began = time.monotonic()
    codes, words = run(RANKS, results / "reference-ranks", partial(train, world, results / "reference", values))
    assert codes == [0] * RANKS, words
    duration, draw, number = time.monotonic() - began, random.Random(0), 0
    found: list[dict[str, Any]] = []
    chains = [results / "chain-0"]
    while len(found) < kills or (len({kill["saved"] for kill in found}) < PHASES and len(found) < 4 * kills):
        number += 1
        out, victims = results / f"ranks-{number}", VICTIMS[len(found) % len(VICTIMS)]
        begun_before = changed(chains[-1])
        children = start(RANKS, out, partial(train, world, chains[-1], values, resume=True), words=True)
        while (
            changed(chains[-1]) == begun_before
        ):  # until they have met, only the process that started them can end them
            time.sleep(0.01)
        time.sleep(draw.uniform(0, SHARE * duration))
        if os.waitpid(children[0], os.WNOHANG)[0]:  # it had ended by itself: the next kill is of a new run
            exit_codes(children[1:], MINUTE)
            chains.append(results / f"chain-{number}")
            continue
        for rank in victims:
            os.kill(children[rank], signal.SIGKILL)
        killed_at = time.monotonic()
        codes = exit_codes(children, MINUTE)
        said = [Path(f"{out}.{rank}.txt").read_text() for rank in range(RANKS)]
        took = time.monotonic() - killed_at
        found.append({"victims": victims, "codes": codes, "took": took, "words": said, "saved": newest(chains[-1])})
    for chain in chains:
        codes, words = run(RANKS, results / "last", partial(train, world, chain, values, resume=True))
        assert codes == [0] * RANKS, words
    return {"kills": found, "chains": [str(chain) for chain in chains]}


if __name__ == "__main__":
    import_all()
    seen = kill_again_and_again(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    print(json.dumps(seen))
