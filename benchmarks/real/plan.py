"""Arms, learning rates and the runs of the claim: GRPO from a base makes the teacher, distillation starts from the same base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.real.curves import updates_to
from benchmarks.real.store import Row, Setting, Store


def _support(support: str, size: int, tail: str) -> dict[str, Any]:
    return {"objective": {"support": support, "top_k": size, "tail": tail}}


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
    rollouts: int | None = None
    """A step; None is ROLLOUTS."""
    steps: Mapping[str, int] | None = None
    """Updates by optimizer; None is OPD_STEPS, or of reinforcement learning GRPO_STEPS."""
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])


ARMS: Mapping[str, Arm] = {
    "grpo": Arm(
        title="GRPO",
        reinforced=True,
        recipe={"rl": {"weight": 1, "distill_weight": 0, "reward": "exact_match"}},
    ),
    "reverse_kl": Arm(title="OPD, reverse KL"),
    "reverse_kl_32": Arm(title="OPD, reverse KL, 32 rollouts", rollouts=32, steps={"adamw": 40}),
    "forward_kl": Arm(title="OPD, forward KL", recipe={"objective": {"divergence": "forward_kl"}}),
    "jsd": Arm(title="OPD, JSD (β = 0.5)", recipe={"objective": {"divergence": "generalized_jsd", "beta": 0.5}}),
    "top16": Arm(title="OPD, reverse KL, teacher's top 16, bucket", recipe=_support("teacher_top_k", 16, "bucket")),
    "top64": Arm(title="OPD, reverse KL, teacher's top 64, bucket", recipe=_support("teacher_top_k", 64, "bucket")),
    "top16_sampled": Arm(
        title="OPD, reverse KL, teacher's top 16, sampled tail", recipe=_support("teacher_top_k", 16, "sampled")
    ),
    "student_top16": Arm(
        title="OPD, reverse KL, student's top 16, bucket", recipe=_support("student_top_k", 16, "bucket")
    ),
    "sampled": Arm(
        title="OPD, sampled token (k1 as an advantage)",
        recipe={"objective": {"support": "sampled", "estimator": "k1", "delivery": "advantage"}},
    ),
}
SUPPORTS = ("reverse_kl", "forward_kl", "jsd", "top64", "top16", "top16_sampled", "student_top16", "sampled")
"""The arms of the comparison of divergences and supports, all with the rate chosen for the reverse KL."""


def batch(arm: Arm) -> dict[str, int]:
    """Prompts and samples of a step."""
    samples = GROUP if arm.reinforced else 1
    return {"prompts_per_step": rollouts(arm) // samples, "samples_per_prompt": samples}


def rollouts(arm: Arm) -> int:
    """Of a step."""
    return arm.rollouts or ROLLOUTS


Kind = tuple[str, str, str]
"""Arm, optimizer and weights."""
WARM_UP = 3
"""Updates, of every arm; without one the first updates of distillation take the reverse KL from 3 to 5 and 8 nats."""
GRPO_STEPS = 80
OPD_STEPS = {"adamw": 24, "muon": 24, "natural_gradient": 4}
TUNING_STEPS = {"adamw": 16, "muon": 16, "natural_gradient": 4}
"""Of distillation on the tuning seed, where a rate has to be fast."""
FULL, LORA = "full", "lora16"
RATES: Mapping[Kind, Sequence[float]] = {
    ("grpo", "adamw", FULL): (3e-5, 6e-5, 1e-4),
    ("grpo", "muon", FULL): (3e-4, 1e-3, 3e-3),
    ("grpo", "adamw", LORA): (1e-4, 3e-4, 1e-3),
    ("reverse_kl", "adamw", FULL): (5e-5, 1e-4, 2e-4),
    ("reverse_kl_32", "adamw", FULL): (1e-4, 2e-4),
    ("reverse_kl", "muon", FULL): (3e-4, 1e-3, 3e-3),
    ("reverse_kl", "adamw", LORA): (3e-4, 1e-3, 3e-3),
    ("reverse_kl", "natural_gradient", FULL): (0.1, 0.3),
}
"""Learning rates that every arm is tried with on the tuning seed; of natural_gradient trust regions in nats per token."""
TEACHING = ("grpo", "adamw", FULL)
"""The arm whose run is the teacher of its seed."""


def setting(
    arm: Kind, lr: float, seed: int, cell: str = "hard", *, teacher_lr: float | None = None, measured: bool = False
) -> Setting:
    """One run of an arm; all but the teaching one are measured against the teacher that GRPO made with `teacher_lr` on the same seed."""
    name, optimizer, weights = arm
    opd_steps = ARMS[name].steps or (TUNING_STEPS if seed == TUNING_SEED else OPD_STEPS)
    steps = GRPO_STEPS if ARMS[name].reinforced else opd_steps[optimizer]
    teacher = "" if teacher_lr is None or arm == TEACHING else setting(TEACHING, teacher_lr, seed, cell).name
    return Setting(
        cell=cell,
        arm=name,
        optimizer=optimizer,
        weights=weights,
        lr=lr,
        seed=seed,
        steps=steps,
        teacher=teacher,
        measured=measured,
    )


def teaches(this: Setting) -> bool:
    """True for a run whose student is kept as a teacher."""
    return (this.arm, this.optimizer, this.weights) == TEACHING


def grid(arm: Kind, teacher_lr: float | None) -> list[Setting]:
    """Every rate on the tuning seed."""
    return [setting(arm, rate, TUNING_SEED, teacher_lr=teacher_lr) for rate in RATES[arm]]


def chosen(store: Store, arm: Kind, teacher_lr: float | None) -> float | None:
    """The rate that is first at four fifths of the teacher's gain, or where none is there the one that ends highest; of the teaching arm
    the one that ends highest. None while the grid is incomplete."""
    settings = grid(arm, teacher_lr)
    if store.missing(settings):
        return None

    def worse(row: Row) -> tuple[float, float]:
        at = None if arm == TEACHING else updates_to(row.series("rewards"), level(row, 0.8))
        return (at if at is not None else float("inf"), -row.number("final_accuracy"))

    return min(store.of(settings), key=worse).setting.lr


def level(row: Row, share: float) -> float:
    """The accuracy at a share of the way from the base to the teacher."""
    base, teacher = row.number("base_accuracy"), row.number("teacher_accuracy")
    return base + share * (teacher - base)


def claim(store: Store) -> list[Setting]:
    """What can be run now of the first table: grids before seeds, and the teachers before those that learn from them."""
    rate = chosen(store, TEACHING, None)
    if rate is None:
        return grid(TEACHING, None)
    found = [setting(TEACHING, rate, seed) for seed in SEEDS]
    for arm in RATES:
        best = None if arm == TEACHING else chosen(store, arm, rate)
        found += grid(arm, rate) if best is None else [setting(arm, best, seed, teacher_lr=rate) for seed in SEEDS]
    return found


def supports(store: Store) -> list[Setting]:
    """What can be run now of the comparison of divergences and supports: once the reverse KL's rate is chosen."""
    rate = chosen(store, TEACHING, None)
    best = None if rate is None else chosen(store, ("reverse_kl", "adamw", FULL), rate)
    if best is None or store.missing([setting(TEACHING, rate, seed) for seed in SEEDS] if rate else []):
        return []
    return [
        setting((arm, "adamw", FULL), best, seed, teacher_lr=rate, measured=True) for seed in SEEDS for arm in SUPPORTS
    ]
