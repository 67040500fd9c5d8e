"""The outside check: one arm of reinforcement learning in TRL's GRPOTrainer, beside the benchmark's own."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.convergence import plan
from benchmarks.convergence.report import Interval, ratio
from benchmarks.convergence.store import Row, Setting, Store, one_thread, perform
from benchmarks.convergence.train import Curve
from benchmarks.convergence.world import world
from benchmarks.trl_environment import run_module, trl_python

ARM = ("grpo4", "adamw")
LEVELS = (50, 80, 90)
STOP = 90
OPD, TRL, REPLAY = "opd", "TRL", "TRL, opd's samples"
TRAINERS = (OPD, TRL, REPLAY)
"""The trainers; the last one samples with opd's random numbers, the second with its own."""
COLUMNS = (
    "trainer",
    "cell",
    "method",
    "optimizer",
    "lr",
    "rollouts",
    "seed",
    "max_steps",
    "base_accuracy",
    "teacher_accuracy",
    *(f"steps_{level}" for level in LEVELS),
    "seconds_per_step",
    "versions",
    "curve",
)


@dataclass(frozen=True)
class OutsideRun(Row):
    """A line of trl.csv."""

    @property
    def trainer(self) -> str:
        return self["trainer"]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self[name] for name in COLUMNS[:8])

    @property
    def seed(self) -> int:
        return int(self["seed"])


Trainer = Callable[[Setting], OutsideRun]


def settings(tuned: Store, arm: tuple[str, str] = ARM) -> list[Setting]:
    """The arm at its tuned rate on the reporting seeds."""
    lr = plan.chosen(tuned, *arm)
    return [s for s in plan.report(tuned, [arm]) if s.lr == lr]


def trainers(runs: Store) -> dict[str, Trainer]:
    """The three trainers of the arm. opd's runs are taken from runs.csv where it has them."""
    return {OPD: partial(own_run, runs), TRL: partial(_theirs, TRL), REPLAY: partial(_theirs, REPLAY)}


def read_runs(path: Path) -> list[OutsideRun]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [OutsideRun(values) for values in csv.DictReader(file)]


def fill(path: Path, asked: Iterable[Setting], by: Mapping[str, Trainer]) -> Iterator[OutsideRun]:
    """Runs of every setting by every trainer that the file lacks. A finished run is a line of the file."""
    there = {run.key for run in read_runs(path)}
    for setting in plan.by_seed(asked):
        for name, trainer in by.items():
            if _key(name, setting) in there:
                continue
            run = trainer(setting)
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(run.values)
            yield run


def _key(trainer: str, setting: Setting) -> tuple[str, ...]:
    cell = setting.cell
    facts = (setting.method, setting.optimizer, setting.lr, cell.rollouts, setting.seed, setting.max_steps)
    return (trainer, cell.name, *(str(fact) for fact in facts))


def own_run(runs: Store, setting: Setting, *, name: str = OPD) -> OutsideRun:
    """The benchmark's own run, from runs.csv where that has it with this base and teacher, or anew: on a processor that rounds
    otherwise, the same seed makes another teacher."""
    one_thread()
    row = runs.rows.get(setting.key)
    there = world(setting.cell, setting.seed)
    made = (f"{there.base_accuracy:.5f}", f"{there.teacher_accuracy:.5f}")
    if row is None or (row["base_accuracy"], row["teacher_accuracy"]) != made:
        row = perform(setting)
    return finished(name, setting, row.curve, float(row["seconds_per_step"]), "")


def _theirs(trainer: str, setting: Setting) -> OutsideRun:
    world(setting.cell, setting.seed)  # made here, read there
    case = {"setting": asdict(setting) | {"stop_level": STOP}, "own_draws": trainer == TRL}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"
        path.write_text(json.dumps(case))
        result = run_module(trl_python(), "benchmarks.convergence.trl_worker", Path(folder), str(path), threads=1)
    versions = " ".join(f"{name}={version}" for name, version in result["versions"].items())
    return finished(trainer, setting, Curve(result["steps"], result["values"]), result["seconds"], versions)


def finished(trainer: str, setting: Setting, curve: Curve, seconds: float, versions: str) -> OutsideRun:
    """A run as a line of the file; `seconds` are of the CPU, per update."""
    there = world(setting.cell, setting.seed)
    reached = [curve.reached(there.level(level / 100)) for level in LEVELS]
    values = (
        *_key(trainer, setting),
        f"{there.base_accuracy:.5f}",
        f"{there.teacher_accuracy:.5f}",
        *("" if steps is None else str(steps) for steps in reached),
        f"{seconds:.4f}",
        versions,
        " ".join(f"{s}:{v:.4f}" for s, v in zip(curve.steps, curve.values, strict=True)),
    )
    return OutsideRun(dict(zip(COLUMNS, values, strict=True)))


def compare_losses() -> dict[str, Any]:
    """Largest differences between one update of TRL and one of opd, on the same samples."""
    with tempfile.TemporaryDirectory() as folder:
        return run_module(trl_python(), "benchmarks.convergence.trl_worker", Path(folder), "--check", threads=1)


def table(runs: Sequence[OutsideRun]) -> str:
    """Updates to the levels, and the ratio to opd's over the seeds that both have."""
    by = {trainer: [r for r in runs if r.trainer == trainer] for trainer in TRAINERS}
    if not by[OPD] or not by[TRL]:
        return ""
    lines = [
        f"## The same arm in TRL\n\n{_title(runs)}: updates to a share of the teacher's gain, mean (lowest–highest); in square brackets "
        "TRL's over opd's, with the 95 % interval, over seeds in pairs.\n",
        "| trainer | seeds | " + " | ".join(f"{level} %" for level in LEVELS) + " | CPU s per step |",
        "| --- | ---: |" + " ---: |" * (len(LEVELS) + 1),
    ]
    for trainer, found in by.items():
        if found:
            lines.append(line(trainer, found, by[OPD]))
    lines.append(f"\n{_verdict(by[OPD], by[TRL])}")
    if by[REPLAY]:
        lines.append(f"\n{apart(by[OPD], by[REPLAY], 'opd', 'TRL')}")
    return "\n".join(lines)


def line(trainer: str, found: Sequence[OutsideRun], opd: Sequence[OutsideRun]) -> str:
    """A trainer's line of the table: updates to each level, over opd's, and CPU seconds per update."""
    cells = [_cell(found, opd, level, own=found is opd) for level in LEVELS]
    cost = fmean(r.number("seconds_per_step") for r in found)
    return f"| {trainer} | {len(found)} | " + " | ".join(cells) + f" | {cost:.3f} |"


def _title(runs: Sequence[OutsideRun]) -> str:
    values = runs[0].values
    return f"Groups of 4, AdamW at {values['lr']}, {values['rollouts']} rollouts a step"


def _cell(found: Sequence[OutsideRun], opd: Sequence[OutsideRun], level: int, *, own: bool) -> str:
    steps = {r.seed: float(s) for r in found if (s := r.steps(level)) is not None}
    if len(steps) < len(found):
        return f"{len(steps)} of {len(found)}"
    text = f"{fmean(steps.values()):.0f} ({min(steps.values()):.0f}–{max(steps.values()):.0f})"
    part = None if own else over(found, opd, level)
    return text if part is None else f"{text} [{part.value:.2f}, {part.low:.2f} to {part.high:.2f}]"


def over(found: Sequence[OutsideRun], opd: Sequence[OutsideRun], level: int) -> Interval | None:
    """Updates over opd's."""
    theirs, ours = ({r.seed: float(s) for r in runs if (s := r.steps(level)) is not None} for runs in (found, opd))
    return ratio(theirs, ours) if theirs.keys() & ours.keys() else None


def _verdict(opd: Sequence[OutsideRun], trl: Sequence[OutsideRun]) -> str:
    ratios = {level: over(trl, opd, level) for level in LEVELS}
    agreed = [f"{level} %" for level, found in ratios.items() if found is not None and found.low <= 1 <= found.high]
    if len(agreed) == len(LEVELS):
        return "TRL sampling for itself agrees with opd: the interval of the ratio holds 1 at every level."
    return f"TRL sampling for itself does not agree with opd everywhere: the interval of the ratio holds 1 only at {', '.join(agreed) or 'no level'}."


FAR = 0.01


def _points(run: OutsideRun) -> dict[int, float]:
    return dict(zip(run.curve.steps, run.curve.values, strict=True))


def apart(opd: Sequence[OutsideRun], replay: Sequence[OutsideRun], drawer: str, trainer: str) -> str:
    """Number of updates for which a trainer on the random numbers of `drawer`, whose runs are `opd`, stays on their curve."""
    own = {r.seed: _points(r) for r in opd}
    differences = [
        {step: abs(value - own[r.seed][step]) for step, value in _points(r).items() if step in own[r.seed]}
        for r in replay
        if r.seed in own
    ]
    together = []
    for each in differences:
        far = next((step for step, difference in each.items() if difference > FAR), None)
        together.append(max(step for step in each if far is None or step < far))
    start = max(each[s] for each in differences for s in each if s <= min(together))
    largest = max(max(each.values()) for each in differences)
    return (
        f"With {drawer}'s random numbers {trainer}'s accuracy is {drawer}'s to {FAR:g} for the first {', '.join(map(str, together))} updates (by seed). "
        f"The largest difference up to update {min(together)} is {start:.5f}, of all {largest:.3f}."
    )
