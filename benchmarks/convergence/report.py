"""Ratios with their intervals, and the tables that quote them."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.store import LEVELS, Row

RESAMPLES = 10_000
Arm = tuple[str, str]
Seconds = Mapping[tuple[str, str, str], float]
"""CPU seconds of a step: cell, method and optimizer."""


def is_rl(method: str) -> bool:
    """True if the reward is the only training signal."""
    return METHODS[method].objective is None and METHODS[method].rl is not None


@dataclass(frozen=True)
class Interval:
    """A ratio of means over seeds, with the middle 95 % of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Interval:
    """Mean over mean of the seeds that both have; seeds are drawn again in pairs, because they share a base and a teacher."""
    seeds = sorted(above.keys() & below.keys())
    source = random.Random(0)
    draws = sorted(
        fmean(above[s] for s in picked) / fmean(below[s] for s in picked)
        for picked in (source.choices(seeds, k=len(seeds)) for _ in range(RESAMPLES))
    )
    value = fmean(above[s] for s in seeds) / fmean(below[s] for s in seeds)
    return Interval(value, draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1])


@dataclass(frozen=True)
class Group:
    """One arm in one cell: a run for every seed."""

    cell: str
    method: str
    optimizer: str
    rows: tuple[Row, ...]

    @property
    def arm(self) -> Arm:
        return self.method, self.optimizer

    @property
    def title(self) -> str:
        return f"{METHODS[self.method].title}, {OPTIMIZERS[self.optimizer]}"

    @property
    def rollouts(self) -> int:
        return int(self.rows[0]["rollouts"])

    def reached(self, level: int) -> int:
        """Number of seeds."""
        return sum(row.steps(level) is not None for row in self.rows)

    def steps(self, level: int) -> dict[int, float]:
        """By seed. A run that ended before counts as long as it was: the mean is then a lower bound."""
        return {int(r["seed"]): float(r.steps(level) or int(r["max_steps"])) for r in self.rows}

    def mean(self, level: int) -> float:
        return fmean(self.steps(level).values())


OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "natural_gradient": "natural gradient",
    "natural_gradient_damped": "natural gradient, more damping",
}


def groups(rows: Iterable[Row]) -> list[Group]:
    """In the order of the first run of each. An arm with several rates in a cell keeps the best."""
    found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["cell"], row["method"], row["optimizer"]), {}).setdefault(row["lr"], []).append(row)
    best = []
    for key, by_lr in found.items():
        each = [Group(*key, tuple(sorted(part, key=lambda r: int(r["seed"])))) for part in by_lr.values()]
        most = max(len(g.rows) for g in each)
        best.append(min((g for g in each if len(g.rows) == most), key=lambda g: g.mean(80) + g.mean(90)))
    return best


@dataclass(frozen=True)
class Comparison:
    """An arm against the best arm of reinforcement learning in the same measure, of those that got there with every seed."""

    group: Group
    level: int
    measure: str
    reference: Group
    interval: Interval
    bound: str
    """'' for a ratio, '≥' where no arm of reinforcement learning got there with every seed."""


def comparison(group: Group, pool: Sequence[Group], level: int, measure: str, seconds: Seconds) -> Comparison | None:
    """None where the arm itself did not reach the level in every seed, or there is nothing to compare with."""

    def factor(g: Group) -> float:
        if measure == "steps":
            return 1.0
        return float(g.rollouts) if measure == "rollouts" else seconds[g.cell, g.method, g.optimizer]

    full = [g for g in pool if len(g.rows) == len(group.rows)]
    if group.reached(level) < len(group.rows) or not full:
        return None
    reference = min(
        [g for g in full if g.reached(level) == len(g.rows)] or full, key=lambda g: g.mean(level) * factor(g)
    )
    above = {s: n * factor(reference) for s, n in reference.steps(level).items()}
    below = {s: n * factor(group) for s, n in group.steps(level).items()}
    bound = "" if reference.reached(level) == len(reference.rows) else "≥"
    return Comparison(group, level, measure, reference, ratio(above, below), bound)


def compare(found: Sequence[Group], seconds: Seconds, *, measures: Sequence[str]) -> list[Comparison]:
    """Every arm at every level, within its cell."""
    out = []
    for group in found:
        pool = [g for g in found if g.cell == group.cell and is_rl(g.method)]
        for level in LEVELS:
            out += [c for m in measures if (c := comparison(group, pool, level, m, seconds)) is not None]
    return out


COLUMNS: tuple[str, ...] = (
    "cell", "method", "optimizer", "lr", "rollouts_per_step", "level", "seeds", "steps", "reference", "reference_steps", "reference_reached",
    "step_ratio", "step_ratio_low", "step_ratio_high", "rollout_ratio", "rollout_ratio_low", "rollout_ratio_high",
    "compute_ratio", "compute_ratio_low", "compute_ratio_high",
)  # fmt: skip
NAMES = {"steps": "step_ratio", "rollouts": "rollout_ratio", "seconds": "compute_ratio"}


def write_ratios(path: Path, compared: Iterable[Comparison]) -> None:
    """One row per cell, arm and level."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for c in compared:
        g = c.group
        line = lines.setdefault((g.cell, *g.arm, str(c.level)), {})
        if c.measure == "steps":
            line |= {
                "cell": g.cell,
                "method": g.method,
                "optimizer": g.optimizer,
                "lr": g.rows[0]["lr"],
                "rollouts_per_step": str(g.rollouts),
                "level": str(c.level),
                "seeds": str(len(g.rows)),
                "steps": f"{g.mean(c.level):.1f}",
                "reference": f"{c.reference.method}:{c.reference.optimizer}",
                "reference_steps": f"{c.reference.mean(c.level):.1f}",
                "reference_reached": f"{c.reference.reached(c.level)}/{len(c.reference.rows)}",
            }
        name = NAMES[c.measure]
        line |= {
            name: f"{c.interval.value:.2f}",
            f"{name}_low": f"{c.interval.low:.2f}",
            f"{name}_high": f"{c.interval.high:.2f}",
        }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines.values())


def steps_table(found: Sequence[Group], compared: Sequence[Comparison], seconds: Seconds) -> str:
    """Markdown: steps to every level, seconds of a step, and the ratios at 80 and 90 %."""
    lines = [
        "| method | rate | "
        + " | ".join(f"{n} %" for n in LEVELS)
        + " | CPU s per step | fewer steps at 80 % | at 90 % | less CPU at 80 % |",
        "| --- | ---: |" + " ---: |" * len(LEVELS) + " ---: | ---: | ---: | ---: |",
    ]
    seeds = max((len(g.rows) for g in found), default=0)
    for g in found:
        cells = [_steps(g, level) for level in LEVELS]
        title = g.title if len(g.rows) == seeds else f"{g.title} ({len(g.rows)} of {seeds} seeds run)"
        by = {(c.level, c.measure): c for c in compared if c.group is g}
        cost = seconds.get((g.cell, g.method, g.optimizer))
        ratios = [_ratio(by.get(k)) for k in ((80, "steps"), (90, "steps"), (80, "seconds"))]
        lines.append(
            f"| {title} | {float(g.rows[0]['lr']):g} | "
            + " | ".join(cells)
            + f" | {'' if cost is None else f'{cost:.3f}'} | "
            + " | ".join(ratios)
            + " |"
        )
    return "\n".join(lines)


def _steps(group: Group, level: int) -> str:
    """Mean and range over seeds; how many got there, where not all did."""
    values = [s for row in group.rows if (s := row.steps(level)) is not None]
    if len(values) < len(group.rows):
        return f"{len(values)} of {len(group.rows)}"
    return f"{fmean(values):.0f} ({min(values)}–{max(values)})"


def _ratio(c: Comparison | None) -> str:
    return "" if c is None else f"{c.bound}{c.interval}"


def grid_table(rows: Iterable[Row], rates: Mapping[str, Sequence[float]], score: Callable[[Row], float]) -> str:
    """Markdown: steps to 80 % of every rate of every arm, the chosen one bold; in brackets the share of the gain where 80 % was not reached."""
    by_arm: dict[Arm, dict[float, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault((row["method"], row["optimizer"]), {}).setdefault(float(row["lr"]), []).append(row)
    lines = []
    for optimizer, grid in rates.items():
        lines += [
            "",
            f"| {OPTIMIZERS[optimizer]} | " + " | ".join(f"{lr:g}" for lr in grid) + " |",
            "| --- |" + " ---: |" * len(grid),
        ]
        for (method, name), by_lr in by_arm.items():
            if name != optimizer or len(by_lr) < len(grid):
                continue
            best = min(grid, key=lambda lr: fmean(map(score, by_lr[lr])))
            cells = [f"**{t}**" if lr == best else t for lr in grid if (t := _tuned(by_lr[lr]))]
            lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _tuned(rows: Sequence[Row]) -> str:
    steps = [row.steps(80) for row in rows]
    if all(s is not None for s in steps):
        return f"{fmean(s for s in steps if s is not None):.0f}"
    shares = [
        (max(r.curve.values) - r.number("base_accuracy")) / (r.number("teacher_accuracy") - r.number("base_accuracy"))
        for r in rows
    ]
    return f"({fmean(shares):.2f})"
