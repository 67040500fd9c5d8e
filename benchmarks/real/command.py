"""Evidence on SmolLM2-135M-Instruct, by `opd train` itself. `make evidence-real` does what is missing, then writes tables and figures.

It may be stopped and called again: every finished run is a line of results/real/runs.csv with its whole setting.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

from benchmarks import RESULTS as ALL_RESULTS
from benchmarks.real import plan
from benchmarks.real.pages import write_pages
from benchmarks.real.run import perform
from benchmarks.real.store import Setting, Store, fill
from benchmarks.real.words import CELLS
from benchmarks.real.world import make_base

RESULTS = ALL_RESULTS / "real"
PARTS: dict[str, Callable[[Store], list[Setting]]] = {"claim": plan.claim, "supports": plan.supports}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread and 4 GiB each")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "report"), help="these parts; default all")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM:OPTIMIZER:WEIGHTS", help="these arms, e.g. grpo:adamw:full; default all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds; default all")
    parser.add_argument(
        "--prepare", action="store_true", help="only make the base and the prompts that recipes/smollm2 name"
    )
    options = parser.parse_args(argv)
    if options.prepare:
        print(f"The base is in {make_base(CELLS['hard'], plan.SEEDS[0])}.")
        return 0
    parts = options.only or (*PARTS, "report")
    store = Store(RESULTS / "runs.csv")
    arms = [tuple(arm.split(":")) for arm in options.arms or ()]

    def wanted() -> list[Setting]:
        found = [setting for name, settings in PARTS.items() if name in parts for setting in settings(store)]
        return [
            s
            for s in store.missing(found)
            if (not arms or (s.arm, s.optimizer, s.weights) in arms)
            and (options.seeds is None or s.seed in options.seeds)
        ]

    while todo := wanted():  # finished grids bring new runs
        for row in fill(store, todo, perform, options.workers):
            print(
                f"{time.strftime('%H:%M')} {row.setting.name}: {row['base_accuracy']} → {row['final_accuracy']}",
                flush=True,
            )
    if "report" in parts:
        write_pages(RESULTS, store)
    return 0
