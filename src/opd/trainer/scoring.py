"""Rollouts → micro-batches with everything that the update reads: the teacher's view of them, and the reward's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd.config import Config
from opd.data.pack import concatenate, pack
from opd.losses import Hybrid
from opd.teachers.local import LocalTeacher
from opd.trainer.reinforce import Advantages, Reinforcement
from opd.types import Batch, Rollout, TargetKind


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One step's micro-batches, and what their update minimises."""

    batches: Sequence[Batch]
    objective: Hybrid
    rewards: tuple[float, ...] | None = None
    """In the order of the rollouts."""
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    """What a person should be told."""


class StepScorer:
    """Asks whoever has a say at a step: the teacher, the reward, or both."""

    def __init__(
        self,
        config: Config,
        *,
        teacher: LocalTeacher | None,
        reinforcement: Reinforcement | None,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.teacher = teacher
        self.reinforcement = reinforcement
        self.layout = {
            "layout": config.train.layout,
            "tokens_per_microbatch": config.train.tokens_per_microbatch,
            "pad_id": pad_id,
            "reduction": config.objective.reduction,
            "global_count": config.objective.fixed_count,
            "device": device,
        }

    def score(self, rollouts: Sequence[Rollout], step: int) -> Scored:
        """Raises DataError for a reward that fails, where the recipe says that this ends the run."""
        objective = self.config.rl.at(step, self.config.train.steps, self.config.objective)
        said: Advantages | None = None
        if objective.rl_weight != 0.0:
            assert self.reinforcement is not None
            said = self.reinforcement.advantages(rollouts)
        layout = {**self.layout, "advantages": None if said is None else said.per_token}
        if objective.distill_weight == 0.0:
            batches: Sequence[Batch] = pack(rollouts, None, **layout)
        else:
            assert self.teacher is not None
            batches = scored_batches(rollouts, self.teacher, self.teacher.kind, **layout)
        if said is None:
            return Scored(batches=batches, objective=objective, metrics={})
        weights = {"rl/weight": objective.rl_weight, "rl/distill_weight": objective.distill_weight}
        return Scored(
            batches=batches,
            objective=objective,
            rewards=said.rewards,
            metrics={**said.metrics, **weights},
            notes=said.notes,
        )


def scored_batches(
    rollouts: Sequence[Rollout], teacher: LocalTeacher, kind: TargetKind, **layout: Any
) -> Sequence[Batch]:
    """Micro-batches with targets; `layout` is what `pack` takes. Hidden states, top-k and sampled log-probs are small and scored at
    once; whole logits are scored when their micro-batch is used, and not kept."""
    if kind == "dense":
        return _ScoredWhenUsed(pack(rollouts, None, **layout), teacher)
    return pack(rollouts, teacher.score(rollouts, kind), **layout)


class _ScoredWhenUsed(Sequence[Batch]):
    def __init__(self, batches: list[Batch], teacher: LocalTeacher) -> None:
        self._batches = batches
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        targets = self._teacher.score(batch.rollouts, "dense")
        return dataclasses.replace(batch, target=concatenate(targets, batch.response_ids.device))
