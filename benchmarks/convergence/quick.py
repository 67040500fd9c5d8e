"""Two minutes for CI: on a small cell the orderings hold, by margins that held over five seeds."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from benchmarks.convergence.store import Row, Setting, one_thread, perform
from benchmarks.convergence.train import NATURAL
from benchmarks.convergence.world import Cell

CELL = Cell(name="quick", digits=4, teacher_steps=120)
LEVEL = 80
RATES = {("grpo4", "muon"): 0.006, ("reverse_kl", "muon"): 0.024, ("reverse_kl", NATURAL): 0.1}
CAPS = {("grpo4", "muon"): 120, ("reverse_kl", "muon"): 60, ("reverse_kl", NATURAL): 12}
MARGINS = (2.0, 2.5)
"""GRPO's updates over those of distillation with Muon, and these over those with the natural gradient, at least. Seeds 0 to 4 have 2.8 to
3.7, and 3.3 to 4.7."""


def quick(seed: int = 0) -> int:
    """Prints what it found; 1 when an ordering does not hold."""
    one_thread()
    started = time.perf_counter()
    steps = orderings(seed)
    found = steps[0] / steps[1], steps[1] / steps[2]
    print(
        f"updates to {LEVEL} % of the teacher's gain, seed {seed}: GRPO {steps[0]:g}, reverse KL with Muon {steps[1]:g}, with the natural "
        f"gradient {steps[2]:g}; {time.perf_counter() - started:.0f} s"
    )
    for value, margin, what in zip(found, MARGINS, ("GRPO over Muon", "Muon over natural gradient"), strict=True):
        print(f"{what}: {value:.1f}, at least {margin} asked: {'ok' if value >= margin else 'NOT REACHED'}")
    return int(any(value < margin for value, margin in zip(found, MARGINS, strict=True)))


def orderings(seed: int) -> tuple[float, float, float]:
    """Updates of GRPO, of reverse KL with Muon, and with the natural gradient. GRPO that did not get there counts its cap, the others ∞."""
    rows = [_run(arm, seed) for arm in RATES]
    steps = [row.steps(LEVEL) for row in rows]
    grpo = float(steps[0] or CAPS["grpo4", "muon"])
    return grpo, *(math.inf if s is None else float(s) for s in steps[1:])  # pyright: ignore[reportReturnType]


def _run(arm: tuple[str, str], seed: int) -> Row:
    setting = Setting(
        cell=CELL, method=arm[0], optimizer=arm[1], lr=RATES[arm], seed=seed, max_steps=CAPS[arm], stop_level=LEVEL
    )
    return perform(replace(setting))
