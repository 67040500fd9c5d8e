"""One timed run of opd's own loop, on the recipe a user would write. `python -m benchmarks.loop.opd_worker CASE RESULT`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.loop.clock import Case, StepClock, read_case
from opd.config import Config
from opd.config.recipe import build
from opd.reporting.progress import Progress
from opd.reporting.record import RunRecorder
from opd.trainer.from_config import RunComponents
from opd.trainer.guard import Guard
from opd.trainer.loop import TrainingLoop
from opd.trainer.run_folder import RunFolder
from opd.trainer.run_state import RunState
from opd.types import Rollout

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


class TimedRecorder(RunRecorder):
    """The ordinary recorder, files and all, which also marks the end of each step."""

    def __init__(self, run_dir: str, clock: StepClock) -> None:
        super().__init__(run_dir, resume_step=None)
        self._clock = clock

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step(step, metrics)
        tokens = int(metrics["tokens"])
        self._clock.step(
            rollouts=round(tokens / metrics["response_length"]),
            tokens=tokens,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
        )


def main(case_path: str, result_path: str) -> None:
    case = read_case(case_path)
    torch.set_num_threads(case.threads)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as run_dir:
        sampled = train(RunComponents(recipe(case, run_dir)), clock)
    clock.write(result_path, prompts=[r.prompt_ids for step in sampled for r in step], versions=VERSIONS)


def train(parts: RunComponents, clock: StepClock) -> list[list[Rollout]]:
    """All steps of the recipe, each timed; the rollouts of every step."""
    config, run_dir = parts.config, parts.config.run_dir
    sampled: list[list[Rollout]] = []
    replaced: Any = parts
    sample, score = parts.sampler.sample, replaced.teacher.score

    def sample_and_note(*args: Any, **kwargs: Any) -> list[Rollout]:
        with clock.phase("rollout"):
            rollouts = sample(*args, **kwargs)
        sampled.append(list(rollouts))
        return sampled[-1]

    replaced.sampler.sample = sample_and_note
    replaced.teacher.score = clock.wrap(score, "teacher")
    # The teacher's head runs when the loss needs it; its time belongs to the teacher all the same.
    replaced.student.teacher_logits = clock.wrap(parts.student.teacher_logits, "teacher")
    with TimedRecorder(run_dir, clock) as run, Progress(config.train.steps, enabled="off") as progress:
        clock.restart()
        state = RunState(Path(run_dir), config.train.steps, progress.warn_once)
        loop = TrainingLoop(
            components=parts,
            folder=RunFolder(run_dir),
            run=run,
            progress=progress,
            state=state,
            guard=Guard(config),
        )
        loop.run_steps()
    return sampled


def recipe(case: Case, run_dir: str) -> Config:
    """The case in opd's words. What is not named is opd's default."""
    return build(
        {
            "student": {"model": case.student, "device": "cpu"},
            "teacher": {"model": case.teacher},
            "prompts": {"path": case.data, "shuffle": False},
            "objective": {"divergence": "reverse_kl"},
            "rollout": {"max_new_tokens": case.max_new_tokens, "temperature": 1.0},
            "optimizer": {"lr": case.lr, "warmup_steps": 0, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "train": {
                "steps": case.steps,
                "prompts_per_step": case.rollouts_per_step,
                "samples_per_prompt": 1,
                "autocast": "bfloat16" if case.bfloat16 else "none",
            },
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "log": {"progress": "off"},
            "run_dir": run_dir,
            "seed": case.seed,
        }
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
