"""The loop. Pure distillation, hybrid and pure RL differ in the objective, never here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opd.config import Config
from opd.errors import DataError, OutOfMemoryError
from opd.reporting.findings import cut_off
from opd.reporting.progress import Progress, TrainingPhase
from opd.reporting.record import RunRecorder, read_metrics
from opd.seeding import derive_seed
from opd.trainer.checkpoint import checkpoints, save_checkpoint, version_of
from opd.trainer.guardrails import memory_advice
from opd.trainer.interrupts import Interrupted, StopRequest
from opd.trainer.records import nothing_to_gain, record_evaluation, record_samples
from opd.trainer.run_folder import RunFolder
from opd.trainer.setup import RunComponents
from opd.types import LossOutput


def run_steps(
    config: Config,
    parts: RunComponents,
    folder: RunFolder,
    run: RunRecorder,
    progress: Progress,
    stop: StopRequest | None = None,
) -> None:
    """From the student's version to the last step. A step is rollouts, their targets, one update; then what is due.

    Raises Interrupted between two steps after a signal; what was trained is in a checkpoint then.
    """
    student, train = parts.student, config.train
    stop = StopRequest() if stop is None else stop
    evaluate_if_missing(config, parts, run, progress, stop)
    for step in range(student.version, train.steps):
        clock = Clock(progress)
        prompts = parts.order.take(step, train.prompts_per_step)
        parts.sampler.limit(config.rollout.horizon(step, train.steps))
        with saved_on_error(config, parts, folder):
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
        if config.rollout.horizon(step, train.steps) == config.rollout.max_new_tokens:
            progress.warn_once(cut_off(out.metrics["truncated"], config.rollout.max_new_tokens), "cut off")
        progress.update(step, metrics)
        with saved_on_error(config, parts, folder):
            if evaluation_due(config, student.version):
                evaluate(config, parts, run, progress, stop, first=False)
            if due(student.version, config.checkpoint.every):
                save(config, parts, folder)
            stop.check()


@contextmanager
def saved_on_error(config: Config, parts: RunComponents, folder: RunFolder) -> Iterator[None]:
    """A signal, a reward that fails or memory that runs out where no weight moves: what was trained is saved first, so that a run
    resumes where it stopped. An evaluation that is left out then is made by the run that is resumed."""
    try:
        yield
    except (Interrupted, DataError, OutOfMemoryError):
        done = checkpoints(folder.checkpoints)
        if parts.student.version > (version_of(done[-1]) if done else 0):
            save(config, parts, folder)
        raise


def save(config: Config, parts: RunComponents, folder: RunFolder) -> None:
    save_checkpoint(folder.checkpoints, parts.student, {"inputs": parts.fingerprints}, keep=config.checkpoint.keep)


def evaluation_due(config: Config, version: int) -> bool:
    """Whether the student is evaluated when it has had `version` updates."""
    return config.eval.every > 0 and (version % config.eval.every == 0 or version == config.train.steps)


def evaluate_if_missing(
    config: Config, parts: RunComponents, run: RunRecorder, progress: Progress, stop: StopRequest
) -> None:
    """The evaluation before the first step, or the one that a stopped run left out; and a first one where a resumed run measures
    something else than before."""
    evaluator = parts.evaluator
    if evaluator is None:
        return
    version = parts.student.version
    records = read_metrics(run.run_dir) if version > 0 else []
    done = [r for r in records if r.kind == "eval" and r.measure in (None, evaluator.measure)]
    expected = {"student"} if parts.teacher is None or parts.teacher_sampler is None else {"student", "teacher"}
    if not expected <= {r.who for r in done}:
        evaluate(config, parts, run, progress, stop, first=True)
    elif evaluation_due(config, version) and not any(r.who == "student" and r.step == version for r in done):
        evaluate(config, parts, run, progress, stop, first=False)


def evaluate(
    config: Config, parts: RunComponents, run: RunRecorder, progress: Progress, stop: StopRequest, *, first: bool
) -> None:
    """Held-out evaluation of the student, and of the teacher before the first step. A signal cuts it short: no weight moves."""
    if parts.evaluator is None:
        return
    version = parts.student.version
    extra = first or version == config.train.steps
    with memory_advice("eval"):
        progress.phase("eval")
        with stop.at_once():
            student = parts.evaluator.run(parts.student_sampler, parts.student, extra=extra)
        record_evaluation(run, version, "student", student, parts.renderer, config.log, parts.evaluator.measure)
        teacher = None
        if first and parts.teacher is not None and parts.teacher_sampler is not None:
            with stop.at_once(), parts.teacher.active():
                teacher = parts.evaluator.run(parts.teacher_sampler, parts.teacher_policy, extra=True)
            record_evaluation(run, version, "teacher", teacher, parts.renderer, config.log, parts.evaluator.measure)
    reached = student.metrics
    apart = f", reverse KL {reached['reverse_kl']:.4f}" if "reverse_kl" in reached else ""
    cut = f", {reached['truncated']:.1%} cut off" if reached["truncated"] else ""
    progress.message(f"step {version}: held-out accuracy {reached['accuracy']:.3f}{apart}{cut}")
    progress.warn_once(cut_off(reached["truncated"], config.rollout.max_new_tokens), "cut off")
    if teacher is not None and version == 0:
        progress.warn_once(
            nothing_to_gain(student.metrics, student.intervals, teacher.metrics, config), "nothing to gain"
        )


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
