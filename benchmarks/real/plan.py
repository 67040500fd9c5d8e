"""Arms, learning rates and the runs of the claim: GRPO from a base makes the teacher, distillation starts from the same base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.real.curves import updates_to
from benchmarks.real.store import Row, Setting, Store

ROLLOUTS, GROUP = 128, 8
LEVELS = (0.5, 0.8, 0.9)
"""Shares of the teacher's gain."""
SEEDS = (0, 1, 2)
TUNING_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method: what it adds to the common recipe."""

    title: str
    reinforced: bool = False
    """GRPO: groups of GROUP answers, no teacher."""
    warm_up: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])


ARMS: Mapping[str, Arm] = {
    "grpo": Arm(
        title="GRPO",
        reinforced=True,
        warm_up=3,
        recipe={"rl": {"weight": 1, "distill_weight": 0, "reward": "exact_match"}},
    ),
    "reverse_kl": Arm(title="OPD, reverse KL"),
}


def batch(arm: Arm) -> dict[str, int]:
    """Every arm has the same number of rollouts a step."""
    samples = GROUP if arm.reinforced else 1
    return {"prompts_per_step": ROLLOUTS // samples, "samples_per_prompt": samples}


GRPO_STEPS = 80
OPD_STEPS = {"adamw": 16, "muon": 16, "natural_gradient": 5}
FULL, LORA = "full", "lora16"
RATES: Mapping[tuple[str, str, str], Sequence[float]] = {
    ("grpo", "adamw", FULL): (3e-5, 6e-5, 1e-4),
    ("grpo", "muon", FULL): (3e-4, 1e-3, 3e-3),
    ("grpo", "adamw", LORA): (1e-4, 3e-4, 1e-3),
    ("reverse_kl", "adamw", FULL): (1e-5, 3e-5, 1e-4),
    ("reverse_kl", "muon", FULL): (3e-4, 1e-3, 3e-3),
    ("reverse_kl", "adamw", LORA): (3e-4, 1e-3, 3e-3),
    ("reverse_kl", "natural_gradient", FULL): (0.1, 0.3),
}
"""Learning rates that every arm is tried with on the tuning seed; of natural_gradient trust regions in nats per token."""
TEACHING = ("grpo", "adamw", FULL)
"""The arm whose run is the teacher of its seed."""


def setting(
    arm: tuple[str, str, str], lr: float, seed: int, cell: str = "hard", *, teacher_lr: float | None = None
) -> Setting:
    """One run of an arm; a distillation has the teacher that GRPO made with `teacher_lr` on the same seed."""
    name, optimizer, weights = arm
    steps = GRPO_STEPS if ARMS[name].reinforced else OPD_STEPS[optimizer]
    teacher = "" if teacher_lr is None else setting(TEACHING, teacher_lr, seed, cell).name
    return Setting(
        cell=cell, arm=name, optimizer=optimizer, weights=weights, lr=lr, seed=seed, steps=steps, teacher=teacher
    )


def teaches(this: Setting) -> bool:
    """True for a run whose student is kept as a teacher."""
    return (this.arm, this.optimizer, this.weights) == TEACHING


def grid(arm: tuple[str, str, str], teacher_lr: float | None) -> list[Setting]:
    """Every rate on the tuning seed."""
    lr = None if ARMS[arm[0]].reinforced else teacher_lr
    return [setting(arm, rate, TUNING_SEED, teacher_lr=lr) for rate in RATES[arm]]
