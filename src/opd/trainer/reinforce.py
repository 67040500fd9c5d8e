"""Rollouts → the advantage of each of their tokens: rewards compared within each prompt's samples, and a penalty for leaving the
reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.config import RlConfig
from opd.losses import group_relative_advantage, leave_one_out_advantage
from opd.ranks import ALONE, Ranks
from opd.rewards import Scorer
from opd.teachers.base import Teacher
from opd.types import Rollout, SampledTarget

NO_SIGNAL = (
    "all rewards are equal in every group, so reinforcement learning has no signal in this step; more samples per prompt, an easier or "
    "finer reward, or a better start would give it one"
)


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """The reward's signal for one step's rollouts."""

    per_token: tuple[torch.Tensor, ...]
    """One tensor per rollout, one number per response token."""
    rewards: tuple[float, ...]
    metrics: dict[str, float]
    notes: tuple[str, ...]


class Reinforcement:
    """Turns rewards into advantages: the comparison within a group, and the penalty for leaving the reference, if there is one."""

    def __init__(self, config: RlConfig, scorer: Scorer, *, reference: Teacher | None, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.scorer = scorer
        self.reference = reference
        self.ranks = ranks

    def advantages(self, rollouts: Sequence[Rollout]) -> Advantages:
        """Rewards are compared among the rollouts of one `group`."""
        scores = self.scorer.score([(r.prompt, r.text) for r in rollouts], [r.finished for r in rollouts])
        rewards = torch.tensor(scores.values, dtype=torch.float64)
        group = torch.tensor([r.group for r in rollouts])
        if self.config.advantage == "rloo":
            per_sequence = leave_one_out_advantage(rewards, group)
        else:
            per_sequence = group_relative_advantage(rewards, group, self.config.normalize_std)
        groups = [rewards[group == g] for g in group.unique()]
        idle = sum(bool((g == g[0]).all()) for g in groups) / len(groups)
        metrics = {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/failed": len(scores.failures) / len(rollouts),
            "rl/groups_without_signal": idle,
        }
        notes = [NO_SIGNAL] if idle == 1.0 else []
        if scores.failures:
            notes.append(
                f"{len(scores.failures)} of {len(rollouts)} rewards failed and count as 0: {scores.failures[0]}"
            )
        per_token = [
            torch.full((len(r.response_ids),), float(a)) for r, a in zip(rollouts, per_sequence.tolist(), strict=True)
        ]
        if self.reference is not None:
            reference, costs = self.reference, [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
            gaps = self.ranks.each(costs, lambda mine: self._gaps([rollouts[i] for i in mine], reference))
            metrics["rl/reference_kl"] = float(torch.cat(gaps).mean())
            per_token = [a - self.config.reference_kl * gap for a, gap in zip(per_token, gaps, strict=True)]
        return Advantages(per_token=tuple(per_token), rewards=scores.values, metrics=metrics, notes=tuple(notes))

    def _gaps(self, rollouts: Sequence[Rollout], reference: Teacher) -> list[torch.Tensor]:
        """log p − log p_reference of every response token (nats): on-policy, its mean is the KL to the reference."""
        gaps = []
        for rollout, target in zip(rollouts, reference.score(rollouts, "sampled"), strict=True):
            assert isinstance(target, SampledTarget) and rollout.sampler_logp is not None
            gaps.append(torch.tensor(rollout.sampler_logp) - target.teacher_logp.float().cpu())
        return gaps
