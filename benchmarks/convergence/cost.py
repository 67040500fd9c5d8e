"""CPU time per step, and the rollouts that a gradient signal-to-noise ratio of one needs."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.model import TinyDecoder
from benchmarks.convergence.train import Job, collect, total_loss, train, updater
from benchmarks.convergence.world import Cell, World, world

ROUNDS, TIMED_STEPS = 5, 3
STAGES = (0.0, 0.5, 0.9)
"""Shares of the teacher's gain at which the gradient is looked at."""
SIGNAL_METHODS = (
    "grpo4",
    "grpo16",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "top_k",
    "sampled",
    "sampled_baseline",
    "seq_kd",
)
BATCHES, ROLLOUTS = 96, 64


def job(cell: Cell, method: str, optimizer: str, lr: float, seed: int) -> Job:
    return Job(
        method=METHODS[method],
        optimizer=optimizer,
        lr=lr,
        rollouts=cell.rollouts,
        digits=cell.digits,
        domains=cell.domains,
        seed=seed,
        max_steps=1000,
    )


def seconds_per_step(cell: Cell, arms: Iterable[tuple[str, str]], seed: int) -> dict[tuple[str, str], float]:
    """Arms take turns, so that a slow minute of the machine meets them all; the fastest round of each counts."""
    there = world(cell, seed)
    fastest: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for method, optimizer in arms:
            student = copy.deepcopy(there.base)
            this = job(cell, method, optimizer, 1e-4, seed)
            update = updater(student, this)
            update(*collect(this, student, there.teachers, 0))
            started = time.process_time()
            for step in range(1, TIMED_STEPS + 1):
                update(*collect(this, student, there.teachers, step))
            spent = (time.process_time() - started) / TIMED_STEPS
            fastest[method, optimizer] = min(spent, fastest.get((method, optimizer), spent))
    return fastest


def read_costs(path: Path) -> dict[tuple[str, str, str], float]:
    """By cell, method and optimizer."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(r["cell"], r["method"], r["optimizer"]): float(r["seconds_per_step"]) for r in csv.DictReader(file)}


def write_costs(path: Path, costs: Mapping[tuple[str, str, str], float]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("cell", "method", "optimizer", "seconds_per_step"))
        writer.writerows((*key, f"{value:.4f}") for key, value in costs.items())


@dataclass(frozen=True)
class Signal:
    """Of one method's gradient at one stage of training."""

    method: str
    stage: float
    seed: int
    accuracy: float
    batch: float
    """B = tr Σ / |g|², rollouts; Σ is the covariance of one rollout's gradient, g the mean. inf where |g|² could not be told from 0."""


def signals(cell: Cell, seed: int, optimizer: str, lr: float, methods: Sequence[str] = SIGNAL_METHODS) -> list[Signal]:
    """At the base and where distillation with reverse KL has made half and nine tenths of the way."""
    there = world(cell, seed)
    student, out, before = copy.deepcopy(there.base), [], 0
    for stage in STAGES:
        if stage:
            this = replace(job(cell, "reverse_kl", optimizer, lr, seed + before), stop_at=there.level(stage))
            student, before = train(this, student, there.teachers, there.held).model, before + 1
        out += [
            Signal(m, stage, seed, there.level(stage), signal_batch(cell, there, student, m, seed)) for m in methods
        ]
    return out


def signal_batch(cell: Cell, there: World, student: TinyDecoder, method: str, seed: int) -> float:
    """tr Σ from the spread of independent batches of n rollouts, and |g|² of their mean less the noise that is left in it."""
    this = replace(job(cell, method, "adamw", 1.0, seed), rollouts=ROLLOUTS)
    parameters = list(student.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    squares = 0.0
    for number in range(BATCHES):
        batch, logits = collect(this, student, there.teachers, 1_000_000 + number)
        gradient = torch.autograd.grad(total_loss(batch, logits(), this.method.hybrid), parameters)
        flat = torch.cat([g.flatten() for g in gradient]).double()
        total += flat
        squares += float(flat @ flat)
    mean = float(total @ total) / BATCHES**2
    spread = (squares / BATCHES - mean) * BATCHES / (BATCHES - 1)  # trace of the covariance of a batch's gradient
    clean = mean - spread / BATCHES
    return ROLLOUTS * spread / clean if clean > 0 else float("inf")


def read_signals(path: Path) -> list[Signal]:
    """Reads earlier measurements."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Signal(r["method"], float(r["stage"]), int(r["seed"]), float(r["accuracy"]), float(r["batch"]))
            for r in csv.DictReader(file)
        ]
