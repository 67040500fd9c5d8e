"""Shared by all runs of a seed: the badly taught base, the teacher that GRPO made of it, and held-out prompts."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks import FOLDER
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.model import Shape, TinyDecoder
from benchmarks.convergence.task import VOCAB, Prompts, accuracy, fitted, held_out
from benchmarks.convergence.train import Job, train
from opd.seeding import derive_seed

CACHE = FOLDER / ".convergence"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A task and a base."""

    name: str
    digits: int = 8
    wrong: float = 1.0
    """Scale of the demo's probabilities of a wrong digit in the base's training answers."""
    rollouts: int = 256
    """Per step, of every method."""
    domains: tuple[int, ...] = (0,)
    hidden: int = 64
    teacher_hidden: int = 64
    teacher_steps: int = 320


TEACHER_METHOD, TEACHER_OPTIMIZER, TEACHER_LR, TEACHER_ROLLOUTS = "grpo16", "muon", 0.005, 256
"""The teacher is made by GRPO until its accuracy no longer rises, whatever the cell's rollouts per step."""


@dataclass(frozen=True)
class World:
    """Models are not to be trained in place: copy the base."""

    base: TinyDecoder
    teachers: tuple[TinyDecoder, ...]
    """One per domain."""
    held: Prompts
    per_domain: tuple[Prompts, ...]
    base_accuracy: float
    teacher_accuracy: float
    teacher_seconds: float
    """CPU time of making the teachers."""

    def level(self, share: float) -> float:
        """The accuracy at this share of the teacher's gain over the base."""
        return self.base_accuracy + share * (self.teacher_accuracy - self.base_accuracy)


@lru_cache(maxsize=4)
def world(cell: Cell, seed: int) -> World:
    """Made once and kept in a file; a function of the cell and the seed."""
    shared = replace(cell, name="", rollouts=TEACHER_ROLLOUTS)
    name = "-".join(str(value).replace(" ", "") for value in asdict(shared).values()).strip("-")
    path = CACHE / f"{name}-{seed}.pt"
    shape = Shape(VOCAB, 2 * cell.digits + 1, hidden=cell.hidden)
    teacher_shape = replace(shape, hidden=cell.teacher_hidden)
    held = held_out(seed, cell.digits, cell.domains)
    per_domain = tuple(held.at(held.domain == domain) for domain in cell.domains)
    if not path.exists():
        _make(path, shared, shape, teacher_shape, seed, held)
    kept = torch.load(path)
    base = TinyDecoder(shape, 0)
    base.load_state_dict(kept["base"])
    teachers = tuple(TinyDecoder(teacher_shape, 0) for _ in kept["teachers"])
    for teacher, state in zip(teachers, kept["teachers"], strict=True):
        teacher.load_state_dict(state)
    of_teachers = [accuracy(t, part)[0] for t, part in zip(teachers, per_domain, strict=True)]
    return World(
        base=base,
        teachers=teachers,
        held=held,
        per_domain=per_domain,
        base_accuracy=accuracy(base, held)[0],
        teacher_accuracy=sum(of_teachers) / len(of_teachers),
        teacher_seconds=kept["seconds"],
    )


def _make(path: Path, cell: Cell, shape: Shape, teacher_shape: Shape, seed: int, held: Prompts) -> None:
    base = fitted(shape, cell.digits, cell.wrong, cell.domains, seed)
    start = base
    if teacher_shape != shape:
        start = fitted(teacher_shape, cell.digits, cell.wrong, cell.domains, derive_seed(seed, 0, "larger"))
    teachers, curves, seconds = [], [], 0.0
    for domain in cell.domains:
        job = Job(
            method=METHODS[TEACHER_METHOD],
            optimizer=TEACHER_OPTIMIZER,
            lr=TEACHER_LR,
            rollouts=TEACHER_ROLLOUTS,
            digits=cell.digits,
            domains=(domain,),
            seed=derive_seed(seed, domain, "teacher"),
            max_steps=cell.teacher_steps,
        )
        run = train(job, copy.deepcopy(start), (), held.at(held.domain == domain))
        teachers.append(run.model.state_dict())
        curves.append(run.curve)
        seconds += run.seconds_per_step * cell.teacher_steps
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(
        {"base": base.state_dict(), "teachers": teachers, "curves": [vars(c) for c in curves], "seconds": seconds},
        temporary,
    )
    temporary.rename(path)
