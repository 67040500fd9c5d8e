"""The loop. Pure distillation, hybrid and pure RL differ in the objective, never here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opd.config import Config
from opd.reporting.progress import Progress, TrainingPhase
from opd.reporting.record import RunRecorder
from opd.seeding import derive_seed
from opd.trainer.checkpoint import save_checkpoint
from opd.trainer.guardrails import memory_advice
from opd.trainer.records import record_evaluation, record_samples
from opd.trainer.run_folder import RunFolder
from opd.trainer.setup import Parts
from opd.types import LossOutput


def run_steps(config: Config, parts: Parts, folder: RunFolder, run: RunRecorder, progress: Progress) -> None:
    """From the student's version to the last step. A step is rollouts, their targets, one update; then what is due."""
    student, train = parts.student, config.train
    if student.version == 0:
        evaluate(config, parts, run, progress, first=True)
    for step in range(student.version, train.steps):
        clock = Clock(progress)
        prompts = parts.order.take(step, train.prompts_per_step)
        parts.sampler.limit(config.rollout.horizon(step, train.steps))
        with clock.phase("rollout"):
            rollouts = parts.sampler.sample(
                [p for p in prompts for _ in range(train.samples_per_prompt)],
                seed=derive_seed(config.seed, step, "rollout"),
            )
        with clock.phase("teacher"):
            scored = parts.scorer.score(rollouts, step)
        with clock.phase("update"):
            out = student.update(scored.batches, scored.objective)
        parts.student_sampler.policy_version = student.version  # the next rollouts are on-policy again
        metrics = {**out.metrics, **scored.metrics, **clock.times(out)}
        run.step(step, metrics)
        record_samples(run, step, rollouts, out, scored.rewards, parts.renderer, config.log)
        for note in scored.notes:
            progress.message(f"warning: step {step}: {note}")
        progress.update(step, metrics)
        if due(step + 1, config.eval.every) or (config.eval.every and step + 1 == train.steps):
            evaluate(config, parts, run, progress, first=False)
        if due(step + 1, config.checkpoint.every):
            save_checkpoint(folder.checkpoints, student, {"inputs": parts.fingerprints}, keep=config.checkpoint.keep)


def evaluate(config: Config, parts: Parts, run: RunRecorder, progress: Progress, *, first: bool) -> None:
    """Held-out evaluation of the student, and of the teacher before the first step."""
    if parts.evaluator is None:
        return
    version = parts.student.version
    extra = first or version == config.train.steps
    with memory_advice("eval"):
        progress.phase("eval")
        student = parts.evaluator.run(parts.student_sampler, parts.student, extra=extra)
        record_evaluation(run, version, "student", student, parts.renderer, config.log)
        if first and parts.teacher is not None and parts.teacher_sampler is not None:
            with parts.teacher.active():
                teacher = parts.evaluator.run(parts.teacher_sampler, parts.teacher_policy, extra=True)
            record_evaluation(run, version, "teacher", teacher, parts.renderer, config.log)
    reached = student.metrics
    apart = f", reverse KL {reached['reverse_kl']:.4f}" if "reverse_kl" in reached else ""
    progress.message(f"step {version}: held-out accuracy {reached['accuracy']:.3f}{apart}")


def due(completed: int, every: int) -> bool:
    """Whether something that happens every n steps happens after `completed` of them."""
    return every > 0 and completed % every == 0


class Clock:
    """Wall-clock seconds of each phase of a step, and who to blame when memory runs out in one."""

    def __init__(self, progress: Progress) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def phase(self, name: TrainingPhase) -> Iterator[None]:
        began = time.perf_counter()
        self.progress.phase(name)
        with memory_advice(name):
            yield
        self.seconds[f"time/{name}"] = time.perf_counter() - began

    def times(self, out: LossOutput) -> dict[str, float]:
        total = time.perf_counter() - self.began
        return {**self.seconds, "time/step": total, "time/tokens_per_second": out.metrics["tokens"] / total}
