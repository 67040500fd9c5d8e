"""Run as a program: whole runs with divided weights, which end in several ways and go on with other numbers of ranks.

usage: fsdp2_runs.py WORLD RESULTS
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from fsdp2_cases import import_all
from rank_cases import MOST_S, exit_codes, start

from opd.config.recipe import build, merge
from opd.errors import DataError, OpdError
from opd.joining import session
from opd.reporting.record import read_metrics
from opd.trainer.distiller import Distiller
from opd.trainer.follow import follow
from opd.trainer.scoring import Scored, StepScorer
from worlds import settings

torch.set_num_threads(1)
MINUTE = 60
SHORT: dict[str, object] = {"train__steps": 6, "eval__every": 3, "checkpoint__every": 1, "eval__prompts": 4}
LONG: dict[str, object] = {
    "train__steps": 300,
    "eval__every": 0,
    "checkpoint__every": 2,
    "optimizer__schedule": "constant",
}
LEGS = ((4, "fsdp2", 2), (2, "fsdp2", 3), (2, "ddp", 4), (3, "fsdp2", 5), (1, "fsdp2", 6))
"""Ranks, train.parallel and train.steps of a run that goes on four times."""
BAD_STEP = 3


def train(world: Path, run_dir: Path, more: dict[str, object], _out: Path, *, resume: bool = False) -> None:
    """A rank's part in a run of the command line."""
    try:
        with session() as ranks:
            if not ranks.first:
                follow(ranks)
            config = build(merge({}, settings(world, run_dir, **more)))
            Distiller.from_config(config, ranks=ranks).train(resume=resume)
    except OpdError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(1) from None


def train_with_bad_data(world: Path, run_dir: Path, more: dict[str, object], out: Path) -> None:
    """The same, where the last rank meets a bad row in one step."""
    score = StepScorer.score

    def bad(self: StepScorer, rollouts: Sequence[Any], step: int) -> Scored:
        if step == BAD_STEP and int(os.environ["RANK"]) > 0:
            raise DataError("prompt 3 is empty.")
        return score(self, rollouts, step)

    StepScorer.score = bad
    train(world, run_dir, more, out)


def run(ranks: int, out: Path, work: Any) -> tuple[list[int], list[str]]:
    """Exit codes and words of all ranks."""
    codes = exit_codes(start(ranks, out, work, words=True), MOST_S)
    return codes, [Path(f"{out}.{rank}.txt").read_text() for rank in range(ranks)]


def in_legs(world: Path, results: Path, more: dict[str, object]) -> None:
    for leg, (ranks, parallel, steps) in enumerate(LEGS):
        values = {**SHORT, **more, "train__parallel": parallel, "train__steps": steps}
        work = partial(train, world, results / "legs", values, resume=leg > 0)
        codes, words = run(ranks, results / f"leg{leg}", work)
        assert codes == [0] * ranks, words


def killed(world: Path, results: Path) -> dict[str, Any]:
    """A rank of three is killed, and the run goes on with two."""
    values = {**LONG, "train__parallel": "fsdp2"}
    out, folder = results / "killed-ranks", results / "killed"
    children = start(3, out, partial(train, world, folder, values), words=True)
    until = time.monotonic() + 2 * MINUTE
    while time.monotonic() < until and len(rows(folder)) < 3:
        time.sleep(0.05)
    os.kill(children[2], signal.SIGKILL)
    began = time.monotonic()
    codes = exit_codes(children, MINUTE)
    took = time.monotonic() - began
    words = [Path(f"{out}.{rank}.txt").read_text() for rank in range(3)]
    saved, reached = newest(folder), len(rows(folder))
    more = {**values, "train__steps": saved + 2}
    again, said = run(2, results / "killed-again", partial(train, world, folder, more, resume=True))
    went_on = {"codes": again, "words": said, "rows": len(rows(folder))}
    return {"codes": codes, "took": took, "words": words, "saved": saved, "reached": reached, "again": went_on}


def bad_data(world: Path, results: Path) -> dict[str, Any]:
    values = {**LONG, "train__parallel": "fsdp2", "checkpoint__every": 0}
    folder = results / "bad-data"
    codes, words = run(2, results / "bad-data-ranks", partial(train_with_bad_data, world, folder, values))
    return {"codes": codes, "words": words, "saved": newest(folder)}


def adapters(world: Path, results: Path) -> None:
    values = {**SHORT, "train__parallel": "fsdp2", "train__steps": 2, "student__lora__rank": 4, "eval__every": 0}
    for ranks in (1, 2):
        codes, words = run(
            ranks, results / f"lora{ranks}", partial(train, world, results / f"adapters-{ranks}", values)
        )
        assert codes == [0] * ranks, words


def rows(folder: Path) -> list[Any]:
    return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []


def newest(folder: Path) -> int:
    saved = sorted((folder / "checkpoints").glob("step-*"))
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def main(world: Path, results: Path) -> NoReturn:
    import_all()
    codes, words = run(1, results / "one", partial(train, world, results / "whole", SHORT))
    assert codes == [0], words
    in_legs(world, results, {})
    adapters(world, results)
    seen = {"killed": killed(world, results), "bad data": bad_data(world, results)}
    (results / "seen.json").write_text(json.dumps(seen))
    sys.exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
