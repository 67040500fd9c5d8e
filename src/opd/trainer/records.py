"""Records of steps and evaluations in the run folder, and the summary made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from opd.config import Config, LogConfig
from opd.data.rendering import Renderer
from opd.reporting.details import token_details
from opd.reporting.findings import SHOWN_MORE, cut_off, teacher_no_better
from opd.reporting.guarded import onset_notes, read_onsets
from opd.reporting.record import MetricsRecord, RunRecorder, SampleRecord, comparable, read_metrics
from opd.teachers.base import Teacher
from opd.trainer.details import teacher_names
from opd.trainer.evaluate import Evaluation
from opd.types import LossOutput, ModelView, Rollout, TokenViews


def record_samples(
    run: RunRecorder,
    step: int,
    rollouts: Sequence[Rollout],
    out: LossOutput,
    rewards: Sequence[float] | None,
    renderer: Renderer,
    config: LogConfig,
    teacher: Teacher | None = None,
) -> None:
    """The first training rollouts (micro-batches have them by length) with what both models said at each token and their reward, on the
    steps that the recipe keeps."""
    kept = recorded(rollouts, step, config)
    by_id, names = {rollout.id: kl for rollout, kl in out.per_token}, teacher_names(teacher, kept)
    for index, rollout in enumerate(kept):
        kl = by_id[rollout.id].tolist() if rollout.id in by_id else []  # those that train.drop leaves out have none
        reward = None if rewards is None else rewards[index]
        views, name = out.views.get(rollout.id), names.get(rollout.id)
        run.sample(sample_record(step, "train", "student", rollout, kl, reward, renderer, views, name))


def recorded(rollouts: Sequence[Rollout], step: int, config: LogConfig) -> Sequence[Rollout]:
    """The rollouts that a training step puts into the records."""
    return () if step % config.samples_every else rollouts[: config.samples]


def record_evaluation(
    run: RunRecorder,
    step: int,
    who: Literal["student", "teacher"],
    evaluation: Evaluation,
    renderer: Renderer,
    config: LogConfig,
    measure: str | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Metrics, intervals, and the first samples of an evaluation. Nobody asks the student about the teacher's answers."""
    run.evaluation(step, who, evaluation.metrics, evaluation.intervals, measure, evaluation.per_prompt)
    kept = evaluation.rollouts[: config.samples]
    names = teacher_names(teacher, [rollout for rollout, _, _ in kept])
    for rollout, kl, reward in kept:
        views = evaluation.views.get(rollout.id)
        if views is not None and who == "teacher":
            views = replace(views, student=ModelView())
        run.sample(sample_record(step, "eval", who, rollout, kl, reward, renderer, views, names.get(rollout.id)))


def sample_record(
    step: int,
    phase: Literal["train", "eval"],
    who: Literal["student", "teacher"],
    rollout: Rollout,
    kl: Sequence[float],
    reward: float | None,
    renderer: Renderer,
    views: TokenViews | None,
    teacher: str | None,
) -> SampleRecord:
    """A response as a record keeps it, with `kl`, the reverse KL at each of its tokens."""
    prompt, special = renderer.with_special(rollout.prompt_ids)
    return SampleRecord(
        step=step,
        phase=phase,
        who=who,
        prompt=prompt,
        special=special,
        prompt_index=rollout.prompt.index,
        answer=rollout.prompt.answer,
        response=rollout.text,
        tokens=renderer.token_strings(rollout.response_ids),
        joined=renderer.joined_tokens(rollout.response_ids),
        reverse_kl=kl or None,
        reward=reward,
        finished=rollout.finished,
        source=rollout.source,
        teacher=teacher,
        details=token_details(views, len(rollout.response_ids), rollout.sampler_logp, renderer.token_strings),
    )


def summarize(run_dir: Path, config: Config) -> dict[str, Any] | None:
    """Student before, student after and teacher (where there is one), from the records; None when nothing was evaluated. There is
    no row "before" where what is measured now was not measured before the first step."""
    records = comparable(read_metrics(run_dir))
    student = [r for r in records if r.kind == "eval" and r.who == "student"]
    teacher = [r for r in records if r.kind == "eval" and r.who == "teacher"]
    if not student:
        return None
    seconds = sum(r.metrics.get("time/step", 0.0) + r.metrics.get("time/eval", 0.0) for r in records)
    shown_more = config.prompts.teacher_prompt is not None
    shown = {"shown": SHOWN_MORE} if shown_more else {}
    notes = [
        *onset_notes(read_onsets(run_dir)),
        cut_off(student[-1].metrics.get("truncated", 0.0), config.rollout.max_new_tokens),
    ]
    if teacher and student[0].step == 0:
        note = nothing_to_gain(student[0].metrics, student[0].intervals, teacher[0].metrics, shown_more=shown_more)
        notes.append(note)
    return {
        **({"teacher": {**_row(teacher[0]), **shown}} if teacher else {}),
        **({"student_before": _row(student[0])} if student[0].step == 0 else {}),
        "student_after": _row(student[-1]),
        "steps": student[-1].step,
        "seconds": seconds,
        "notes": [note for note in notes if note is not None],
    }


def nothing_to_gain(
    student: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    teacher: Mapping[str, float],
    *,
    shown_more: bool,
) -> str | None:
    """The warning about a teacher that was evaluated beside the student and is no better."""
    return teacher_no_better(student["accuracy"], intervals["accuracy"], teacher["accuracy"], shown_more=shown_more)


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
