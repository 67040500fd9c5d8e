"""Responses that leave the loss (train.drop): cut off, repeating, or correct already (arXiv 2610.03185)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opd.rewards import Scorer
from opd.trainer.metrics import repetition
from opd.trainer.student import Student
from opd.types import LossOutput, Rollout

REPEATING = 0.5  # of a response's 4-grams occurred in it before; ordinary text is far below
CORRECT = 1.0  # the least reward of a correct response
NONE_LEFT = "train.drop left no response of this step, so the student was not updated"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Which rollouts of a step are left, and how many went."""

    left: tuple[int, ...]
    """Places among the step's rollouts."""
    metrics: dict[str, float]
    """Counts, and the metrics of all rollouts that would otherwise be of those left."""


def drop(rollouts: Sequence[Rollout], kinds: Collection[str], rewards: Sequence[float] | None) -> Dropped:
    """Leave out the rollouts of these kinds; "correct" reads the rewards, in the order of the rollouts."""
    marks = {kind: _marked(kind, rollouts, rewards) for kind in ("truncated", "repeating", "correct") if kind in kinds}
    left = tuple(i for i in range(len(rollouts)) if not any(marked[i] for marked in marks.values()))
    count = max(1, len(rollouts))
    metrics = {f"drop/{kind}": float(sum(marked)) for kind, marked in marks.items()}
    metrics |= {
        "drop/responses": float(len(rollouts) - len(left)),
        "truncated": sum(not r.finished for r in rollouts) / count,
        "repetition": sum(repetition(r.response_ids) for r in rollouts) / count,
        "response_length": sum(len(r.response_ids) for r in rollouts) / count,
    }
    return Dropped(left=left, metrics=metrics)


def _marked(kind: str, rollouts: Sequence[Rollout], rewards: Sequence[float] | None) -> list[bool]:
    if kind == "truncated":
        return [not r.finished for r in rollouts]
    if kind == "repeating":
        return [repetition(r.response_ids) >= REPEATING for r in rollouts]
    assert kind == "correct" and rewards is not None
    return [reward >= CORRECT for reward in rewards]


def rewards_of(rollouts: Sequence[Rollout], scorer: Scorer) -> tuple[tuple[float, ...], dict[str, float], list[str]]:
    """The rewards of rollouts that no reinforcement asks about, their metrics, and notes about those that failed."""
    scores = scorer.score([(r.prompt, r.text) for r in rollouts], [r.finished for r in rollouts])
    count = len(rollouts)
    metrics = {"reward/mean": sum(scores.values) / count, "reward/failed": len(scores.failures) / count}
    failed = [
        f"{len(scores.failures)} of {count} rewards failed and count as 0: {text}" for text in scores.failures[:1]
    ]
    return scores.values, metrics, failed


def no_update(student: Student) -> LossOutput:
    """A step whose loss has no token: weights and optimizer stay as they are, and schedules go on."""
    student.version += 1
    return LossOutput(loss=0.0, metrics={"tokens": 0.0})
