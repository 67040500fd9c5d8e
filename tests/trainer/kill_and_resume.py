"""Run as a program: kill −9 a training run again and again, resume it, and say how it ended.

usage: kill_and_resume.py RECIPE REFERENCE_DIR WORK_DIR KILLS SEED

Everything is imported once and every run is a fork, so that a killed process costs no start-up. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import opd.trainer.run  # noqa: F401 - imported before the forks
from opd.cli.main import main

torch.set_num_threads(1)
PHASES = 3  # different newest checkpoints that the kills must have hit; a few more kills are made until they have


def start(recipe: str, run_dir: Path) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr
        os._exit(main(["train", recipe, "--resume", "--run_dir", str(run_dir)]))
    return pid


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, seconds: float) -> bool:
    """SIGKILL after a delay; False when the run had already ended by itself."""
    time.sleep(seconds)
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        assert os.waitstatus_to_exitcode(status) == 0, "the run failed instead of being killed"
        return False
    os.kill(pid, signal.SIGKILL)
    return finish(pid) == -signal.SIGKILL


def run(recipe: str, reference: Path, work: Path, kills: int, seed: int) -> dict[str, object]:
    began = time.perf_counter()
    assert finish(start(recipe, reference)) == 0
    duration = time.perf_counter() - began
    draw = random.Random(seed)
    chains, done, reached = [work / "chain-0"], 0, []
    while done < kills or (len(set(reached)) < PHASES and done < 4 * kills):
        pid = start(recipe, chains[-1])
        if kill_at(pid, draw.uniform(0, 0.5 * duration)):
            done += 1
            saved = sorted((chains[-1] / "checkpoints").glob("step-*"))
            reached.append(int(saved[-1].name[5:]) if saved else -1)
        else:
            chains.append(work / f"chain-{len(chains)}")
    for chain in chains:
        assert finish(start(recipe, chain)) == 0
    return {"kills": done, "chains": [str(c) for c in chains], "checkpoint_at_kill": reached, "seconds": duration}


if __name__ == "__main__":
    recipe_path, reference_dir, work_dir, count, number = sys.argv[1:]
    print(json.dumps(run(recipe_path, Path(reference_dir), Path(work_dir), int(count), int(number))))
