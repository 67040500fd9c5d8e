"""Evidence on SmolLM2-135M-Instruct, by `opd train` itself. `make evidence-real` does what is missing, then writes tables and figures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from benchmarks import RESULTS as ALL_RESULTS
from benchmarks.real import plan
from benchmarks.real.run import perform
from benchmarks.real.store import Setting, Store, fill

RESULTS = ALL_RESULTS / "real"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--arm", help="METHOD:OPTIMIZER:WEIGHTS, e.g. grpo:adamw:full")
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--teacher-rate", type=float)
    options = parser.parse_args(argv)
    name, optimizer, weights = options.arm.split(":")
    arm = (name, optimizer, weights)
    settings = [
        plan.setting(arm, lr, seed, teacher_lr=options.teacher_rate) for seed in options.seeds for lr in options.rates
    ]
    _fill(settings, options.workers)
    return 0


def _fill(settings: Sequence[Setting], workers: int) -> None:
    store = Store(RESULTS / "runs.csv")
    for row in fill(store, settings, perform, workers):
        print(
            f"{time.strftime('%H:%M')} {row.setting.name}: {row['base_accuracy']} → {row['final_accuracy']} ({row['teacher_accuracy']})",
            flush=True,
        )
