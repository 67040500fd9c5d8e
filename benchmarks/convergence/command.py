"""Distillation beside reinforcement learning: steps, rollouts and seconds to a share of the teacher's gain, on the CPU.

`make evidence` does what is missing, then writes tables and figures; it may be stopped and called again. Every finished run is a line of
results/convergence/grid.csv (learning rates) or runs.csv (reported), with its whole setting; a line that is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks import RESULTS as ALL_RESULTS
from benchmarks.convergence import distiller, outside, plan
from benchmarks.convergence.cost import (
    STAGES,
    Signal,
    read_costs,
    read_signals,
    seconds_per_step,
    signals,
    write_costs,
)
from benchmarks.convergence.pages import write_pages
from benchmarks.convergence.quick import quick
from benchmarks.convergence.store import Row, Setting, Store, fill, one_thread

RESULTS = ALL_RESULTS / "convergence"
PARTS: dict[str, Callable[[Store], list[Setting]]] = {
    "main": plan.report,
    "batch": plan.small_batch,
    "endings": plan.endings,
    "teachers": plan.two_teachers,
    "map": plan.ratio_map,
}
"""Reported runs, by the question they answer."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("grid", *PARTS, "costs", "signal", "distiller", "trl", "report"),
        help="these parts; default all but trl, which takes a quarter of an hour and an environment of its own",
    )
    parser.add_argument(
        "--arms", nargs="+", metavar="METHOD:OPTIMIZER", help="these arms of grid and main; default all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two minutes: check that the orderings hold on a small cell"
    )
    options = parser.parse_args(argv)
    if options.quick:
        return quick()
    arms = [(m, o) for m, o in (a.split(":") for a in options.arms)] if options.arms else plan.ARMS
    parts = options.only or ("grid", *PARTS, "costs", "signal", "distiller", "report")
    tuned, runs = Store(RESULTS / "grid.csv"), Store(RESULTS / "runs.csv")
    if "grid" in parts:
        _fill(tuned, plan.grid(arms), options.workers)
    wanted = [
        setting
        for name, settings in PARTS.items()
        if name in parts
        for setting in plan.by_seed(plan.report(tuned, arms) if name == "main" else settings(tuned))
    ]
    if wanted:
        _fill(runs, wanted, options.workers)
    if "costs" in parts:
        _costs(RESULTS / "costs.csv")
    if "signal" in parts:
        _signals(RESULTS / "signal.csv", tuned, options.workers)
    if "distiller" in parts:
        asked = outside.settings(tuned, distiller.ARM)
        _print_runs(outside.fill(RESULTS / "distiller.csv", asked, distiller.trainers(runs)))
    if "trl" in parts:
        _outside(RESULTS / "trl.csv", tuned, runs)
    if "report" in parts:
        write_pages(RESULTS, tuned, runs)
    return 0


def _fill(store: Store, settings: Sequence[Setting], workers: int) -> None:
    for done, total, row in fill(store, settings, workers):
        print(f"{time.strftime('%H:%M')} {store.path.stem} {done}/{total}: {_line(row)}", flush=True)


def _line(row: Row) -> str:
    steps = ", ".join(f"{level}% {row.steps(level) or '-'}" for level in (50, 80, 90, 95))
    return (
        f"{row['cell']}: {row['method']} {row['optimizer']} {row['lr']} seed {row['seed']}: {steps}; "
        f"{row.number('final_accuracy'):.3f} of {row.number('teacher_accuracy'):.3f}, {row.number('seconds_per_step'):.3f} s a step"
    )


def _costs(path: Path) -> None:
    """Timed in one process, after the runs, so that the arms meet the same machine."""
    one_thread()
    costs = read_costs(path)
    for cell, arms in ((plan.MAIN, plan.ARMS), (plan.SMALL_BATCH, plan.MAP_ARMS)):
        missing = [(m, o) for m, o in arms if (cell.name, m, o) not in costs]
        if missing:  # all of them again: only what is timed together can be compared
            measured = seconds_per_step(cell, arms, plan.SEEDS[0])
            costs |= {(cell.name, *arm): value for arm, value in measured.items()}
            write_costs(path, costs)


def _outside(path: Path, tuned: Store, runs: Store) -> None:
    found = outside.compare_losses()
    print(
        "One update of opd and TRL on the same samples: " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True
    )
    _print_runs(outside.fill(path, outside.settings(tuned), outside.trainers(runs)))


def _print_runs(found: Iterable[outside.OutsideRun]) -> None:
    for run in found:
        steps = ", ".join(f"{level}% {run.steps(level) or '-'}" for level in outside.LEVELS)
        print(f"{time.strftime('%H:%M')} {run.trainer}, seed {run.seed}: {steps}", flush=True)


def _signals(path: Path, tuned: Store, workers: int) -> None:
    rate = plan.chosen(tuned, "reverse_kl", "muon")
    there = {s.seed for s in read_signals(path)}
    missing = [seed for seed in plan.SEEDS[:3] if seed not in there]
    if rate is None or not missing:
        return
    if not path.exists():
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(("method", "stage", "seed", "accuracy", "batch"))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for seed, found in zip(missing, pool.map(partial(_signals_of, rate), missing), strict=True):
            with path.open("a", newline="") as file:
                lines = csv.writer(file)
                lines.writerows((s.method, s.stage, s.seed, f"{s.accuracy:.4f}", f"{s.batch:.1f}") for s in found)
            print(f"signal: seed {seed}, at {STAGES}", flush=True)


def _signals_of(rate: float, seed: int) -> list[Signal]:
    return signals(plan.MAIN, seed, "muon", rate)
