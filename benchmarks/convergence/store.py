"""Settings and their results: one line of a CSV per finished run, so that a second call does what is missing."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.task import accuracy
from benchmarks.convergence.train import Curve, Job, train
from benchmarks.convergence.world import Cell, world

LEVELS = (50, 80, 90, 95)
"""Per cent of the teacher's gain."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run, fully said."""

    cell: Cell
    method: str
    optimizer: str
    lr: float
    """Learning rate; of natural_gradient the trust region in nats per token."""
    seed: int
    max_steps: int
    stop_level: int = 95
    """The run ends when this level is reached; 0: at max_steps, with a rate that falls linearly to 0."""

    @property
    def key(self) -> tuple[str, ...]:
        return (*(str(v) for v in asdict(self.cell).values()), *(str(getattr(self, n)) for n in _OWN))

    def job(self, stop_at: float = math.inf) -> Job:
        """For a student of its cell; `stop_at` is an accuracy."""
        return Job(
            method=METHODS[self.method],
            optimizer=self.optimizer,
            lr=self.lr,
            rollouts=self.cell.rollouts,
            digits=self.cell.digits,
            domains=self.cell.domains,
            seed=self.seed,
            max_steps=self.max_steps,
            schedule="constant" if self.stop_level else "linear",
            stop_at=stop_at,
        )


_OWN = tuple(f.name for f in fields(Setting) if f.name != "cell")
_CELL = tuple(f.name for f in fields(Cell))
RESULTS = (
    "base_accuracy",
    "teacher_accuracy",
    *(f"steps_{level}" for level in LEVELS),
    "steps_run",
    "final_accuracy",
    "domain_gains",
    "seconds_per_step",
    "teacher_seconds",
    "curve",
)
COLUMNS = (*("cell" if n == "name" else n for n in _CELL), *_OWN, *RESULTS)


@dataclass(frozen=True)
class Row:
    """A finished run, as the CSV has it."""

    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.values[n] for n in COLUMNS[: len(_CELL) + len(_OWN)])

    def number(self, name: str) -> float:
        return float(self.values[name])

    def steps(self, level: int) -> int | None:
        """Steps to the level; None when the run ended before."""
        value = self.values[f"steps_{level}"]
        return int(value) if value else None

    @property
    def curve(self) -> Curve:
        points = [point.split(":") for point in self.values["curve"].split()]
        return Curve([int(s) for s, _ in points], [float(v) for _, v in points])


def perform(setting: Setting) -> Row:
    """Run it. The world is made when it is not there."""
    cell = setting.cell
    there = world(cell, setting.seed)
    stop_at = there.level(setting.stop_level / 100) if setting.stop_level else math.inf
    run = train(setting.job(stop_at), copy.deepcopy(there.base), there.teachers, there.held)
    gains = []
    for part, teacher in zip(there.per_domain, there.teachers, strict=True):
        before, after = accuracy(there.base, part)[0], accuracy(run.model, part)[0]
        gains.append((after - before) / (accuracy(teacher, part)[0] - before))
    curve = run.curve
    reached = {f"steps_{n}": curve.reached(there.level(n / 100)) for n in LEVELS}
    results = {
        "base_accuracy": f"{there.base_accuracy:.5f}",
        "teacher_accuracy": f"{there.teacher_accuracy:.5f}",
        **{name: "" if value is None else str(value) for name, value in reached.items()},
        "steps_run": str(curve.steps[-1]),
        "final_accuracy": f"{curve.values[-1]:.5f}",
        "domain_gains": " ".join(f"{gain:.4f}" for gain in gains),
        "seconds_per_step": f"{run.seconds_per_step:.4f}",
        "teacher_seconds": f"{there.teacher_seconds:.1f}",
        "curve": " ".join(f"{s}:{v:.4f}" for s, v in zip(curve.steps, curve.values, strict=True)),
    }
    return Row(dict(zip(COLUMNS, setting.key, strict=False)) | results)


class Store:
    """The lines of one CSV."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with path.open(newline="") as file:
                for values in csv.DictReader(file):
                    row = Row(values)
                    self.rows[row.key] = row

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row.values)

    def missing(self, settings: Iterable[Setting]) -> list[Setting]:
        return [s for s in settings if s.key not in self.rows]

    def of(self, settings: Iterable[Setting]) -> list[Row]:
        return [self.rows[s.key] for s in settings if s.key in self.rows]


def one_thread() -> None:
    torch.set_num_threads(1)


def fill(store: Store, settings: Sequence[Setting], workers: int) -> Iterator[tuple[int, int, Row]]:
    """Do what is missing, and say after each run how many of how many are there."""
    todo = store.missing(settings)
    done = len(settings) - len(todo)
    if workers == 1:
        one_thread()
        for setting in todo:
            row = perform(setting)
            store.add(row)
            done += 1
            yield done, len(settings), row
        return
    worlds = dict.fromkeys((s.cell, s.seed) for s in todo)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for made in [pool.submit(_make_world, *pair) for pair in worlds]:
            made.result()
        for future in as_completed([pool.submit(perform, setting) for setting in todo]):
            row = future.result()
            store.add(row)
            done += 1
            yield done, len(settings), row


def _make_world(cell: Cell, seed: int) -> None:
    world(cell, seed)
