"""Distillation beside reinforcement learning: steps, rollouts and seconds to a share of the teacher's gain, on the CPU.

`make evidence` does what is missing, then writes tables and figures; it may be stopped and called again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _convergence_plan as plan
from benchmarks._convergence_store import Row, Setting, Store, fill

RESULTS = Path(__file__).parent / "results" / "convergence"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", choices=("grid", "runs"), help="stop after this part")
    parser.add_argument("--arms", nargs="+", metavar="METHOD:OPTIMIZER", help="of these arms only")
    options = parser.parse_args(argv)
    tuned, runs = Store(RESULTS / "grid.csv"), Store(RESULTS / "runs.csv")
    arms = [tuple(a.split(":")) for a in options.arms] if options.arms else plan.ARMS
    _fill(tuned, plan.grid(arms), options.workers)
    if options.only == "grid":
        return 0
    _fill(runs, plan.by_seed(plan.report(tuned, arms)), options.workers)
    return 0


def _fill(store: Store, settings: Sequence[Setting], workers: int) -> None:
    for done, total, row in fill(store, settings, workers):
        print(f"{store.path.stem} {done}/{total}: {_line(row)}", flush=True)


def _line(row: Row) -> str:
    steps = ", ".join(f"{level}% {row.steps(level) or '-'}" for level in (50, 80, 90, 95))
    return (
        f"{row['method']} {row['optimizer']} {row['lr']} seed {row['seed']}: {steps}; "
        f"{row.number('final_accuracy'):.3f} of {row.number('teacher_accuracy'):.3f}, {row.number('seconds_per_step'):.3f} s a step"
    )
