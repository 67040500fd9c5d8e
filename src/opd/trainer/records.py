"""What a step and an evaluation leave in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from opd.config import LogConfig
from opd.data.rendering import Renderer
from opd.reporting.record import MetricsRecord, RunRecorder, SampleRecord, read_metrics
from opd.trainer.evaluate import Evaluation
from opd.types import LossOutput, Rollout


def record_samples(
    run: RunRecorder,
    step: int,
    rollouts: Sequence[Rollout],
    out: LossOutput,
    rewards: Sequence[float] | None,
    renderer: Renderer,
    config: LogConfig,
) -> None:
    """The first training rollouts (micro-batches have them by length) with their per-token reverse KL and their reward, on the steps
    that the recipe keeps."""
    if step % config.samples_every:
        return
    by_rollout = {id(rollout): kl for rollout, kl in out.per_token}
    for index, rollout in enumerate(rollouts[: config.samples]):
        kl = by_rollout[id(rollout)]
        reward = None if rewards is None else rewards[index]
        run.sample(_sample(step, "train", "student", rollout, kl.tolist(), reward, renderer))


def record_evaluation(
    run: RunRecorder,
    step: int,
    who: Literal["student", "teacher"],
    evaluation: Evaluation,
    renderer: Renderer,
    config: LogConfig,
) -> None:
    """Metrics, intervals, and the first samples of an evaluation."""
    run.evaluation(step, who, evaluation.metrics, evaluation.intervals)
    for rollout, kl, reward in evaluation.rollouts[: config.samples]:
        run.sample(_sample(step, "eval", who, rollout, kl, reward, renderer))


def _sample(
    step: int,
    phase: Literal["train", "eval"],
    who: Literal["student", "teacher"],
    rollout: Rollout,
    kl: Sequence[float],
    reward: float | None,
    renderer: Renderer,
) -> SampleRecord:
    return SampleRecord(
        step=step,
        phase=phase,
        who=who,
        prompt=renderer.decode_all(rollout.prompt_ids),
        prompt_index=rollout.prompt.index,
        answer=rollout.prompt.answer,
        response=rollout.text,
        tokens=renderer.token_strings(rollout.response_ids),
        reverse_kl=kl or None,
        reward=reward,
        finished=rollout.finished,
        source=rollout.source,
    )


def summarize(run_dir: Path) -> dict[str, Any] | None:
    """Student before, student after and teacher (where there is one), from the records; None when nothing was evaluated."""
    records = read_metrics(run_dir)
    student = [r for r in records if r.kind == "eval" and r.who == "student"]
    teacher = [r for r in records if r.kind == "eval" and r.who == "teacher"]
    if not student:
        return None
    seconds = sum(r.metrics.get("time/step", 0.0) + r.metrics.get("time/eval", 0.0) for r in records)
    return {
        **({"teacher": _row(teacher[0])} if teacher else {}),
        "student_before": _row(student[0]),
        "student_after": _row(student[-1]),
        "steps": student[-1].step,
        "seconds": seconds,
    }


def _row(record: MetricsRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "accuracy": record.metrics["accuracy"],
        "interval": list(record.intervals["accuracy"]),
    }
    if "reverse_kl" in record.metrics:
        row["reverse_kl"] = record.metrics["reverse_kl"]
        row["reverse_kl_interval"] = list(record.intervals["reverse_kl"])
    for name, value in record.metrics.items():
        if name.startswith("accuracy_"):
            row[name] = value
            row[f"{name}_interval"] = list(record.intervals[name])
    return row
