"""A training step of opd beside TRL's DistillationTrainer, on a real model: the same weights, prompts and objective on a CPU.

`python -m benchmarks real_step` makes TRL's environment, the student and the prompts where they are missing, runs the trainers in turn,
each time in a new process, and writes benchmarks/results/real/step.csv and step.md. Runs that are in the CSV are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import RESULTS
from benchmarks.loop.clock import Case
from benchmarks.real.step import inputs
from benchmarks.real.step.report import DTYPES, OPD, PHASES, RATES, SIZES, TRL, TRL_PARTS, WORK, page
from benchmarks.real.step.roofline import Shape, work
from benchmarks.real.world import original
from benchmarks.rows import Row, read, write
from benchmarks.trl_environment import run_module, trl_python

ROWS_AT_ONCE = {TRL: None, TRL_PARTS: 8}
TRAINERS = (OPD, *ROWS_AT_ONCE)
RATE = 1e-5
WARM_UP = 1
LOSS_TOLERANCE = 1e-4  # nats per token: float32 sums over 49 thousand tokens are off by less, another loss by more
GIB = 1 << 30
COLUMNS = (
    "trainer", "dtype", "round", *SIZES, "prompt_tokens", "response_tokens", "seconds", "cpu_seconds",
    *(f"{p}_seconds" for p in PHASES), *(f"{p}_cpu_seconds" for p in PHASES), "tokens_per_second", "peak_gib",
    *WORK, *RATES, "first_loss", "difference", "products", "prompts_digest", "versions",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real_step", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of either trainer; default all cores")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each trainer")
    parser.add_argument("--steps", type=int, default=5, help="of a run; the first is not timed")
    parser.add_argument("--prompts", type=int, default=32, help="per step")
    parser.add_argument("--tokens", type=int, default=64, help="of a response at most")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--results", type=Path, default=RESULTS / "real", help="folder for step.csv and step.md")
    options = parser.parse_args(argv)
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps} leaves no step to time; it has to be at least {WARM_UP + 1}.")
    if TRL_PARTS in options.trainers and options.prompts % 8:
        parser.error(f"--prompts {options.prompts} is no multiple of 8, which '{TRL_PARTS}' needs.")
    sizes: dict[str, int] = dict(
        zip(SIZES, (options.threads, options.steps - WARM_UP, options.prompts, options.tokens), strict=True)
    )
    table = options.results / "step.csv"
    rows = kept(table, sizes)
    with tempfile.TemporaryDirectory() as scratch:
        case = prepare(options, Path(scratch))
        for number in range(options.rounds):
            for dtype in options.dtypes:
                for trainer in options.trainers:
                    if any((r["trainer"], r["dtype"], r["round"]) == (trainer, dtype, str(number)) for r in rows):
                        continue
                    setting = {"trainer": trainer, "dtype": dtype, "round": number, **sizes}
                    rows.append(run(case, setting, Path(scratch)))
                    check(rows)
                    write(table, COLUMNS, rows)
    text = page(rows)
    (options.results / "step.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def kept(path: Path, sizes: dict[str, int]) -> list[Row]:
    """Runs of an earlier call. Raises SystemExit where they are of other sizes: one page has one size."""
    rows = read(path) if path.exists() else []
    for name, size in sizes.items():
        if any(r[name] != str(size) for r in rows):
            raise SystemExit(
                f"{path} has runs with {name}={rows[0][name]}, and {size} is asked for. Name another folder by --results."
            )
    return rows


def prepare(options: argparse.Namespace, scratch: Path) -> Case:
    """Models and prompts on disk, for both trainers."""
    student = inputs.noisy_student()
    data = scratch / "prompts.jsonl"
    inputs.write_prompts(data, options.prompts, options.steps)
    return Case(
        name="real step",
        student=str(student),
        teacher=str(original()),
        data=str(data),
        rollouts_per_step=options.prompts,
        max_new_tokens=options.tokens,
        steps=options.steps,
        warmup_steps=WARM_UP,
        lr=RATE,
        threads=options.threads,
        seed=0,
    )


def run(case: Case, setting: dict[str, Any], scratch: Path) -> Row:
    """One run in a fresh process, as a line of the CSV."""
    trainer = setting["trainer"]
    case = replace(
        case, seed=setting["round"], bfloat16=setting["dtype"] == "bfloat16", rows_at_once=ROWS_AT_ONCE.get(trainer)
    )
    path = scratch / "case.json"
    path.write_text(json.dumps(asdict(case)))
    python, worker = (sys.executable, "opd_worker") if trainer == OPD else (trl_python(), "trl_worker")
    result = run_module(python, f"benchmarks.real.step.{worker}", scratch, str(path), threads=case.threads)
    row = setting | summary(result, Shape.of_folder(Path(case.student)))
    print(
        f"{trainer}, {setting['dtype']}, round {setting['round']}: {row['seconds']:.1f} s a step, {row['peak_gib']:.2f} GiB",
        file=sys.stderr,
        flush=True,
    )
    return {name: f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS}


def summary(result: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Medians over the timed steps of one run; of the work, means."""
    steps, lengths = result["steps"][WARM_UP:], result["lengths"][WARM_UP:]
    tasks = [asdict(work(shape, each)) for each in lengths]
    row = {
        "prompt_tokens": median(float(sum(prompt for prompt, _ in each)) for each in lengths),
        "response_tokens": sum(s["tokens"] for s in steps) / len(steps),
        "seconds": median(s["wall"] for s in steps),
        "cpu_seconds": median(s["cpu"] for s in steps),
        "tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["wall"] for s in steps),
        "peak_gib": result["peak_bytes"] / GIB,
        "first_loss": result["steps"][0]["loss"],
        "difference": "",
        "products": result["products"],
        "prompts_digest": result["prompts"],
        "versions": " ".join(f"{name}={version}" for name, version in result["versions"].items()),
    }
    row |= {name: result[name] for name in RATES}
    for phase in PHASES:
        row[f"{phase}_seconds"] = median(s["phases"][phase][0] for s in steps)
        row[f"{phase}_cpu_seconds"] = median(s["phases"][phase][1] for s in steps)
    if "same_batch" in result:
        theirs, ours = result["same_batch"]
        row["difference"] = theirs - ours
    return row | {name: sum(task[name] for task in tasks) / len(tasks) for name in WORK}


def check(rows: Sequence[Row]) -> None:
    """Raises SystemExit where two runs were not of the same prompts, or of another loss."""
    if len({r["prompts_digest"] for r in rows}) != 1:
        raise SystemExit("The trainers did not see the same prompt ids in the same order.")
    for row in rows:
        if row["dtype"] == "float32" and row["difference"] and abs(float(row["difference"])) > LOSS_TOLERANCE:
            raise SystemExit(f"On one batch the losses of opd and TRL differ by {row['difference']}: not comparable.")
