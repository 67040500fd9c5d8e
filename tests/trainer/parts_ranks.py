"""Run as a program: three ranks write checkpoints of divided weights, one of which finds no room.

usage: parts_ranks.py FOLDER
"""

from __future__ import annotations

import errno
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsdp2_cases import import_all
from rank_cases import CASES, in_forks, make_school, recipe, whole
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from opd.errors import RunFolderError
from opd.joining import session
from opd.ranks import Ranks
from opd.trainer.checkpoint import save_checkpoint
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.loop import take_step

torch.set_num_threads(1)
WORLD = 3
AVERAGED: dict[str, object] = {**CASES["an average of the student"], "guard__canary__action": "off"}
"""Weights, averages and moments: all that a checkpoint can hold."""


def fill_disk(rank: int) -> None:
    """From now on this rank has no room."""

    def write(self: Any, plan: Any, planner: Any) -> Any:
        raise OSError(errno.ENOSPC, f"No space left for rank {rank}")

    HuggingFaceStorageWriter.write_data = write


def work(folder: Path, out: Path) -> None:
    with session() as ranks:
        parts = RunComponents(recipe(folder, {**AVERAGED, "train__parallel": "fsdp2"}), Given(ranks=ranks))
        student, place, said = parts.student, folder / "run" / "checkpoints", ""
        parts.draws.load(student)
        for step in range(2):
            take_step(parts, step)
            parts.draws.load(student)
        _save(place, parts, ranks)
        parts.divisions and parts.divisions.close()
        everything = {name: whole(tensor) for name, tensor in student.by_name().items()}
        take_step(parts, 2)
        if ranks.rank == 1:
            fill_disk(ranks.rank)
        try:
            _save(place, parts, ranks)
        except RunFolderError as error:
            said = str(error)
        if ranks.first:
            torch.save({"everything": everything, "own": sum(p.to_local().numel() for p in student.parameters())}, out)
            out.with_suffix(".json").write_text(json.dumps({"said": said, "there": [p.name for p in place.iterdir()]}))


def _save(place: Path, parts: RunComponents, ranks: Ranks) -> None:
    if ranks.first:
        save_checkpoint(place, parts.student, {}, keep=2)
    ranks.gather(None)


if __name__ == "__main__":
    import_all()
    school = Path(sys.argv[1])
    make_school(school)
    sys.exit(not in_forks(WORLD, school / "seen.pt", partial(work, school)))
