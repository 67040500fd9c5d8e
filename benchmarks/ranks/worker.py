"""One rank of a run: its own times of every step, which rank 0 writes for all.

usage: python -m benchmarks.ranks.worker CASE OUT, in processes with the environment that `benchmarks.ranks.command` sets
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from opd.config.recipe import build, merge
from opd.joining import ranks_of, session
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.loop import take_step


def main(case: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(1)
    rank, _ = ranks_of(os.environ)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with session() as ranks:
        parts = RunComponents(build(merge({}, case["recipe"])), Given(ranks=ranks))
        parts.draws.load(parts.student)
        steps = []
        for step in range(case["steps"]):
            ranks.gather(None)  # all begin at the same time
            wall, cpu = time.perf_counter(), time.process_time()
            done = take_step(parts, step)
            parts.draws.load(parts.student)
            mine = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            tokens = sum(len(rollout.response_ids) for rollout in done.rollouts)
            steps.append({"ranks": ranks.gather(mine), "tokens": tokens, "loss": done.out.loss})
        if ranks.first:
            out.write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
