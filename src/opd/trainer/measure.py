"""Any model, evaluated as a run evaluates its student: the same evaluator, prompts, seeds and intervals, outside of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from opd.config import Config
from opd.doctor.checks import notices
from opd.reporting.about import write_about
from opd.reporting.files import EVAL_FILE, write_atomically
from opd.reporting.loading import Loading
from opd.reporting.record import WALL_CLOCK_PREFIX, RunRecorder
from opd.trainer.checkpoint import load_trained_weights
from opd.trainer.evaluate import Evaluation
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.guardrails import memory_advice
from opd.trainer.launch import Launch, about_run
from opd.trainer.load_trained import adapter_student
from opd.trainer.records import record_evaluation
from opd.types import Prompt

Value = TypeVar("Value")

NO_REWARD = "none"
"""In the place of eval.reward: answers are not judged."""


def unjudged(_prompt: Prompt, _response: str) -> float:
    """The reward of answers that are not judged."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation found, and what it was of."""

    parts: RunComponents
    student: Evaluation
    teacher: Evaluation | None
    """Of the teacher's own answers; None where nobody asked, or where it is no model in this process."""
    warnings: tuple[str, ...]
    judged: bool
    """False without a reward."""

    @staticmethod
    def numbers(evaluation: Evaluation) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Metrics without wall-clock times, and their intervals."""
        kept = [name for name in evaluation.metrics if not name.startswith(WALL_CLOCK_PREFIX)]
        return {n: evaluation.metrics[n] for n in kept}, {
            n: evaluation.intervals[n] for n in kept if n in evaluation.intervals
        }


def ready(
    config: Config, checkpoint: Path | None, loading: Loading, *, rows: Sequence[Any] | None = None
) -> RunComponents:
    """The components of a run of this recipe, with a checkpoint's weights in its student. The student may be a LoRA adapter, which a
    run would refuse. `rows` are taken in place of the files of prompts. Raises OpdError as a run would."""
    student = adapter_student(config, loading) if checkpoint is None else None
    given = Given(student=student, rewards={NO_REWARD: unjudged}, prompts=rows, eval_prompts=rows)
    parts = RunComponents(config, given, loading)
    if checkpoint is not None:
        load_trained_weights(checkpoint, parts.student.model, parts.student)
    return parts


def measure(config: Config, *, checkpoint: Path | None, teacher_too: bool, loading: Loading) -> Measured:
    """Evaluate the student of a recipe; a checkpoint's weights take the place of its own. `teacher_too` evaluates the teacher's own
    answers as well. Raises OpdError as a run would."""
    parts = ready(config, checkpoint, loading)
    evaluator = parts.evaluator
    assert evaluator is not None, "the caller gives held-out prompts"
    teacher = None
    loading.begin(f"evaluating on {len(evaluator.prompts):,} prompts")
    with memory_advice("eval"):
        parts.student_sampler.load(parts.student)
        student = parts.evaluate("student", extra=True)
        if teacher_too and parts.teacher is not None and parts.teacher_sampler is not None:
            teacher = parts.evaluate("teacher", extra=True)
    usual, judged = notices(config), config.eval.reward != NO_REWARD
    return Measured(
        parts=parts,
        student=student if judged else _without_reward(student),
        teacher=teacher if judged or teacher is None else _without_reward(teacher),
        warnings=tuple(warning for warning in parts.warnings if warning not in usual),
        judged=judged,
    )


def write_measured(folder: Path, measured: Measured, document: str) -> None:
    """Write an evaluation as files of a run folder, which opd compare reads, with `document` as eval.json. Raises RunFolderError where
    it cannot be written."""
    parts = measured.parts
    config, evaluator = parts.config, parts.evaluator
    assert evaluator is not None
    measured_by = (parts.renderer, config.log, evaluator.measure, parts.teacher)
    with RunRecorder(folder, resume_step=None) as run:
        record_evaluation(run, 0, "student", measured.student, *measured_by)
        if measured.teacher is not None:
            record_evaluation(run, 0, "teacher", measured.teacher, *measured_by)
    write_about(folder, replace(about_run(config, Launch()), data=config.prompts.path))
    write_atomically(folder / EVAL_FILE, (document + "\n").encode())


def _without_reward(evaluation: Evaluation) -> Evaluation:
    """The evaluation without what the reward in the place of none has said."""

    def rest(values: Mapping[str, Value]) -> dict[str, Value]:
        return {name: value for name, value in values.items() if not name.rpartition("/")[2].startswith("accuracy")}

    return replace(
        evaluation,
        metrics=rest(evaluation.metrics),
        intervals=rest(evaluation.intervals),
        per_prompt=rest(evaluation.per_prompt),
        rollouts=[(rollout, kl, math.nan) for rollout, kl, _ in evaluation.rollouts],
    )
