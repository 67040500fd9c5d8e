"""The plan of runs: a learning-rate grid on tuning seeds, then the best rate of each arm on the reporting seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.store import Row, Setting, Store
from benchmarks.convergence.train import DAMPED, NATURAL, NATURALS
from benchmarks.convergence.world import Cell

MAIN = Cell(name="main")
TUNING_SEEDS = (100,)
SEEDS = (0, 1, 2, 3, 4)
GRID: Mapping[str, tuple[float, ...]] = {
    "adamw": (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3),
    "muon": (0.003, 0.006, 0.0085, 0.012, 0.024, 0.048),
    **dict.fromkeys(NATURALS, (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2)),
}
"""Learning rates; of natural_gradient trust regions in nats per token. The same for every method."""
FIRST_ORDER = ("adamw", "muon")
RL = ("grpo4", "grpo16")
SECOND = (
    "seq_kd",
    "off_policy_kd",
    "sampled",
    "sampled_baseline",
    "hybrid",
    "forward_kl",
    "jsd",
    "top_k",
    "hybrid_match",
)
ARMS: tuple[tuple[str, str], ...] = (
    *((method, optimizer) for method in (*RL, "reverse_kl") for optimizer in FIRST_ORDER),
    ("reverse_kl", NATURAL),
    ("grpo4_warm", "muon"),
    ("grpo16", DAMPED),
    *((method, "muon") for method in SECOND),
)
"""Method and optimizer, the most important first."""
SELECT = (50, 80, 90)  # levels whose steps choose a learning rate

_TUNING_CAP = {"rl": 160, "opd": 60, "rl natural": 40, "opd natural": 12}
_CAP = {"rl": 240, "opd": 160, "rl natural": 90, "opd natural": 24}


def _kind(method: str, optimizer: str) -> str:
    pure_rl = METHODS[method].objective is None and METHODS[method].rl is not None
    return ("rl" if pure_rl else "opd") + (" natural" if optimizer in NATURALS else "")


def grid(arms: Iterable[tuple[str, str]] = ARMS, cell: Cell = MAIN) -> list[Setting]:
    """Every learning rate of every arm, on the tuning seeds."""
    return [
        Setting(
            cell=cell,
            method=method,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            max_steps=_TUNING_CAP[_kind(method, optimizer)],
        )
        for method, optimizer in arms
        for lr in GRID[optimizer]
        for seed in TUNING_SEEDS
    ]


def score(row: Row) -> float:
    """Smaller is better: steps to the selecting levels, a level that was not reached counting twice the cap less what was gained."""
    cap = row.number("max_steps")
    span = row.number("teacher_accuracy") - row.number("base_accuracy")
    gained = (max(row.curve.values) - row.number("base_accuracy")) / span
    return sum(cap * (2 - gained) if (s := row.steps(level)) is None else s for level in SELECT)


def chosen(store: Store, method: str, optimizer: str, cell: Cell = MAIN) -> float | None:
    """The learning rate with the best mean score over the tuning seeds; None while the grid is incomplete."""
    settings = grid([(method, optimizer)], cell)
    if store.missing(settings):
        return None
    by_lr = {lr: fmean(score(row) for row in store.of([s for s in settings if s.lr == lr])) for lr in GRID[optimizer]}
    return min(by_lr, key=lambda lr: by_lr[lr])


def _at_chosen(tuned: Store, arms: Iterable[tuple[str, str]], cell: Cell = MAIN) -> list[Setting]:
    """The chosen learning rate of every arm on the reporting seeds; arms whose grid is incomplete are left out."""
    settings = []
    for method, optimizer in arms:
        lr = chosen(tuned, method, optimizer)
        if lr is not None:
            cap = _CAP[_kind(method, optimizer)]
            settings += [
                Setting(cell=cell, method=method, optimizer=optimizer, lr=lr, seed=seed, max_steps=cap)
                for seed in SEEDS
            ]
    return settings


def report(tuned: Store, arms: Iterable[tuple[str, str]] = ARMS) -> list[Setting]:
    """The main cell. GRPO with AdamW and Muon also at half its chosen rate, and the better one counts: one tuning seed may have been
    lucky with a rate at which others collapse."""
    found = _at_chosen(tuned, arms)
    halved = [replace(s, lr=s.lr / 2) for s in found if _kind(s.method, s.optimizer) == "rl"]
    return [*found, *halved]


def by_seed(settings: Iterable[Setting]) -> list[Setting]:
    """One seed after the other, so that a stopped run leaves whole seeds."""
    return sorted(settings, key=lambda s: s.seed)


ENDING_STEPS = 100
ENDINGS: tuple[tuple[str, str], ...] = tuple(
    (m, "muon") for m in ("grpo4_warm", "reverse_kl", "hybrid", "hybrid_match")
)
"""The hybrid beside its two parts, all of them for the same number of steps."""


def endings(tuned: Store) -> list[Setting]:
    return [
        replace(s, cell=replace(MAIN, name="endings"), stop_level=0, max_steps=ENDING_STEPS)
        for s in _at_chosen(tuned, ENDINGS)
    ]


TWO = replace(MAIN, name="two teachers", domains=(0, 1), teacher_steps=200)
TWO_SEEDS = SEEDS[:3]


def two_teachers(tuned: Store) -> list[Setting]:
    """One student, prompts of two domains in turn, each with the teacher that learnt it."""
    arms = (("reverse_kl", "muon"), ("reverse_kl", NATURAL))
    return [
        replace(s, cell=TWO, stop_level=0, max_steps=_TWO_STEPS[s.optimizer])
        for s in _at_chosen(tuned, arms)
        if s.seed in TWO_SEEDS
    ]


_TWO_STEPS = {"muon": 100, NATURAL: 12}
MAP_ARMS: tuple[tuple[str, str], ...] = (("grpo4_warm", "muon"), ("reverse_kl", "muon"), ("reverse_kl", NATURAL))
MAP_SEEDS = SEEDS[:3]
_TASKS = tuple(
    Cell(name=f"{digits} digits, {base} base, {rollouts} rollouts", digits=digits, wrong=wrong, rollouts=rollouts)
    for digits, base, wrong in ((8, "easier", 0.6), (4, "same", 1.0), (4, "easier", 0.6))
    for rollouts in (256, 64)
)
_LARGER = replace(MAIN, name="8 digits, same base, 256 rollouts, larger teacher", teacher_hidden=96)
MAP = (*_TASKS, _LARGER)
"""Beside the main cell and the small batch. The larger teacher learnt from a base of its own size."""


def ratio_map(tuned: Store) -> list[Setting]:
    """Every cell at the main cell's rates and at smaller ones; the best counts."""
    return [
        replace(s, cell=cell, lr=lr)
        for cell in MAP
        for s in _at_chosen(tuned, MAP_ARMS)
        if s.seed in MAP_SEEDS
        for lr in _rates(s)
    ]


SMALL_BATCH = replace(MAIN, name="64 rollouts", rollouts=64)


def small_batch(tuned: Store) -> list[Setting]:
    """A quarter of the rollouts per step, at the main cell's rates and at smaller ones; the best counts."""
    found = _at_chosen(tuned, MAP_ARMS)
    return [replace(s, cell=SMALL_BATCH, lr=lr, max_steps=2 * s.max_steps) for s in found for lr in _rates(s)]


def _rates(setting: Setting) -> tuple[float, ...]:
    """Less data a step wants smaller steps, of GRPO most."""
    pure_rl = METHODS[setting.method].objective is None
    return tuple(setting.lr / part for part in ((1, 2, 4) if pure_rl else (1, 2)))
