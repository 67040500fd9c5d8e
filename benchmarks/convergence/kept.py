"""Live rollouts beside kept ones (Semi-OPD, arXiv 2610.11291): `python -m benchmarks.convergence.kept`.

Both arms are `opd.Distiller` with the reverse KL and AdamW on the same fixed set of prompts, bases and teachers; they differ in
rollout.source alone. Accuracy is exact, on held-out prompts. Writes results/convergence/kept.md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import opd
from benchmarks import RESULTS
from benchmarks.convergence.distiller import tokenizer_of_the_task
from benchmarks.convergence.gpt2 import decoder_of, gpt2, texts
from benchmarks.convergence.store import one_thread
from benchmarks.convergence.task import accuracy, draw_prompts, generator
from benchmarks.convergence.train import Curve
from benchmarks.convergence.world import Cell, World, world
from opd.reporting.intervals import mean_interval

CELLS = {
    "main cell: the base is right once in a hundred samples": Cell(name="main"),
    "an easier base: half the wrong answers": Cell(name="easy", wrong=0.5),
}
LR = 0.0048  # tuned for live rollouts, of which every step has new prompts
PROMPTS, PER_STEP = 1024, 256
LOOKED_AT = (4, 8, 16, 24, 32, 48, 64)
LIVE, CACHED = "live", "cached"


@dataclass(frozen=True)
class Arm:
    """One run: its curve of accuracy, and its CPU seconds."""

    curve: Curve
    drawing: float
    """Before training."""
    per_step: float


def run(there: World, cell: Cell, seed: int, source: str, steps: int) -> tuple[Arm, float | None]:
    """A run, and of kept rollouts the initial overlap of student and teacher."""
    curve, overlap, drawing = Curve(), None, 0.0
    curve.add(0, there.base_accuracy)
    with tempfile.TemporaryDirectory() as folder:
        rollout: dict[str, Any] = {"max_new_tokens": cell.digits, "source": source, "batch_size": PER_STEP}
        rollout |= {"path": folder} if source == CACHED else {}
        distiller = distiller_of(there, cell, seed, rollout, steps)
        if source == CACHED:
            began = time.process_time()
            overlap = distiller.draw_rollouts()["overlap"]
            drawing = time.process_time() - began
        _ = distiller.components  # loading is not counted
        spent = 0.0
        for step in range(1, steps + 1):
            began = time.process_time()
            distiller.step()
            spent += time.process_time() - began
            if step in LOOKED_AT:
                student = decoder_of(distiller.components.student.model, there.base.shape)
                curve.add(step, accuracy(student, there.held)[0])
    return Arm(curve, drawing, spent / steps), overlap


def distiller_of(there: World, cell: Cell, seed: int, rollout: dict[str, Any], steps: int) -> opd.Distiller:
    """The arm as a user would write it; the prompts are the same for both, and every fourth step they begin again."""
    tokenizer = tokenizer_of_the_task()
    prompts = draw_prompts(PROMPTS, cell.digits, cell.domains, generator(seed, 0, "kept prompts"))
    return opd.Distiller(
        student=(gpt2(copy.deepcopy(there.base)), tokenizer),
        teacher=(gpt2(there.teachers[0]), tokenizer),
        prompts=texts(prompts.ids),
        rollout=rollout,
        optimizer={"name": "adamw", "lr": LR, "schedule": "linear"},
        train={"steps": steps, "prompts_per_step": PER_STEP, "samples_per_prompt": 1},
        eval={"every": 0},
        checkpoint={"every": 0},
        log={"progress": "off"},
        seed=seed,
    )


def table(title: str, worlds: Sequence[World], arms: dict[str, list[Arm]], overlaps: Sequence[float]) -> Iterator[str]:
    """Share of the teacher's gain at each number of updates, and the difference of the arms over seeds in pairs."""
    base, teacher = (fmean(getattr(w, name) for w in worlds) for name in ("base_accuracy", "teacher_accuracy"))
    yield (
        f"\n**{title}** ({len(worlds)} seeds; base {base:.3f}, teacher {teacher:.3f}; initial overlap {fmean(overlaps):.2f}, "
        f"{min(overlaps):.2f} to {max(overlaps):.2f})\n"
    )
    looked_at = arms[LIVE][0].curve.steps[1:]
    yield f"| share of the teacher's gain after updates | {' | '.join(map(str, looked_at))} | CPU s a step | CPU s before |"
    yield "| --- |" + " ---: |" * (len(looked_at) + 2)
    shares = {
        source: [
            [_share(w, arm.curve.values[1 + i]) for w, arm in zip(worlds, found, strict=True)]
            for i in range(len(looked_at))
        ]
        for source, found in arms.items()
    }
    for source, found in arms.items():
        cells = [_shown(values) for values in shares[source]]
        seconds = fmean(a.per_step for a in found), fmean(a.drawing for a in found)
        yield f"| {source} | {' | '.join(cells)} | {seconds[0]:.3f} | {seconds[1]:.1f} |"
    apart = [[k - v for v, k in zip(*pair, strict=True)] for pair in zip(shares[LIVE], shares[CACHED], strict=True)]
    yield f"| cached − live | {' | '.join(map(_shown, apart))} | | |"


def _share(there: World, value: float) -> float:
    return (value - there.base_accuracy) / (there.teacher_accuracy - there.base_accuracy)


def _shown(values: Sequence[float]) -> str:
    low, high = mean_interval(values)
    return f"{fmean(values):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    one_thread()
    lines = [
        "# Live and kept rollouts\n",
        f"`python -m benchmarks.convergence.kept --seeds {options.seeds} --steps {options.steps}`. Reverse KL, AdamW at {LR} falling to 0, {PROMPTS} prompts "
        f"with one rollout each, {PER_STEP} a step; means with 95 % intervals over seeds, the last row in pairs.",
    ]
    for title, cell in CELLS.items():
        worlds = [world(cell, seed) for seed in range(options.seeds)]
        arms: dict[str, list[Arm]] = {LIVE: [], CACHED: []}
        overlaps: list[float] = []
        for seed, there in enumerate(worlds):
            for source, found in arms.items():
                arm, overlap = run(there, cell, seed, source, options.steps)
                found.append(arm)
                overlaps += [] if overlap is None else [overlap]
                print(title, seed, source, [f"{v:.3f}" for v in arm.curve.values], f"{arm.per_step:.3f} s", flush=True)
        lines += table(title, worlds, arms, overlaps)
        Path(RESULTS / "convergence" / "kept.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
