"""Rollouts → micro-batches with everything that the update reads: the teacher's view of them, and the reward's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd.config import Config
from opd.data.pack import concatenate, count_of, pack, with_target
from opd.losses import Hybrid
from opd.teachers.ensemble import AnyTeacher, Ensemble
from opd.trainer.reinforce import Advantages, Reinforcement
from opd.types import Batch, Rollout, TargetKind, TeacherMixture


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
        teacher: AnyTeacher | None,
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
        fraction = self.config.train.token_fraction
        keep = None if fraction == 1 else least_sure(rollouts, fraction)
        metrics: dict[str, float] = {}
        told = None if self.teacher is None else heard(rollouts, self.teacher)
        if told is not None:
            metrics["unheard_tokens"] = float(sum(int((~tokens).sum()) for tokens in told))
            keep = told if keep is None else [one & other for one, other in zip(keep, told, strict=True)]
        layout = {**self.layout, "advantages": None if said is None else said.per_token, "keep": keep}
        if objective.distill_weight == 0.0:
            batches: Sequence[Batch] = pack(rollouts, None, **layout)
        else:
            assert self.teacher is not None
            teacher, shares = self._teacher_at(step)
            batches = scored_batches(rollouts, teacher, teacher.kind, shares=shares, **layout)
            if isinstance(teacher, Ensemble):
                metrics |= member_metrics(rollouts, batches, teacher)
        if said is None:
            return Scored(batches=batches, objective=objective, metrics=metrics)
        weights = {"rl/weight": objective.rl_weight, "rl/distill_weight": objective.distill_weight}
        return Scored(
            batches=batches,
            objective=objective,
            rewards=said.rewards,
            metrics={**metrics, **said.metrics, **weights},
            notes=said.notes,
        )

    def _teacher_at(self, step: int) -> tuple[AnyTeacher, Mapping[str, float] | None]:
        """The teacher with this step's weights, and each one's share of the tokens where that is to be balanced."""
        teacher, mixture = self.teacher, self.config.mixture
        assert teacher is not None
        if not isinstance(teacher, Ensemble):
            return teacher, None
        weights = mixture.at(step, self.config.train.steps, list(teacher.members))
        return dataclasses.replace(teacher, weights=weights), weights if mixture.balance_tokens else None


def least_sure(rollouts: Sequence[Rollout], fraction: float) -> list[torch.Tensor]:
    """For every rollout, which tokens are in this share of the step's tokens, those of the highest entropy (arXiv 2506.01939); at
    least one is."""
    sizes = [len(r.response_ids) for r in rollouts]
    assert all(r.sampler_entropy is not None for r in rollouts)
    entropy = torch.tensor([h for r in rollouts for h in r.sampler_entropy or ()])
    kept = torch.zeros(len(entropy), dtype=torch.bool)
    kept[entropy.argsort(descending=True, stable=True)[: math.ceil(fraction * len(entropy))]] = True
    return list(kept.split(sizes))


def heard(rollouts: Sequence[Rollout], teacher: AnyTeacher) -> list[torch.Tensor] | None:
    """For every rollout, which tokens the teacher can judge; None where that is all, as it is for samplers of ours.

    Left out are ids that are no token of both models, such as rows that pad the output layer, and what stands after one that the
    teacher has no row for.
    """
    vocabulary, rows = teacher.vocabulary, teacher.rows
    told = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.response_ids)
        unreadable = (ids >= rows).long()
        told.append(vocabulary.owns(ids) & (unreadable.cumsum(0) == unreadable))
    return None if all(bool(tokens.all()) for tokens in told) else told


def member_metrics(rollouts: Sequence[Rollout], batches: Sequence[Batch], teacher: Ensemble) -> dict[str, float]:
    """For every teacher, what it has a say in: the share of the tokens with routing, the mean weight otherwise; and how far a mixed
    one is from the samples (with routing, the update itself tells)."""
    tokens = sum(len(r.response_ids) for r in rollouts)
    if teacher.mixture == "routing":
        groups = teacher.groups(rollouts)
        own = {n: sum(len(rollouts[i].response_ids) for i in groups.get(n, ())) for n in teacher.members}
        return {f"teacher/{name}/share": count / tokens for name, count in own.items()}
    given = [teacher.weights_of(r.prompt) for r in rollouts]
    weights = {f"teacher/{n}/weight": sum(w[i] for w in given) / len(given) for i, n in enumerate(teacher.members)}
    return weights | (_distances(batches, teacher) if isinstance(batches, list) else {})


def _distances(batches: Sequence[Batch], teacher: Ensemble) -> dict[str, float]:
    """Mean log-prob (nats) that each member gives the sampled tokens, at one product with its head; and, where the sampler's is
    known, their difference, which estimates the reverse KL to that member."""
    found: dict[str, float] = {}
    for index, (name, member) in enumerate(teacher.members.items()):
        logps, gaps = [], []
        for batch in batches:
            assert isinstance(batch.target, TeacherMixture)
            logp = member.sampled_logp(batch.target.targets[index], batch.response_ids)
            logps.append(logp)
            if batch.sampler_logp is not None:
                gaps.append(batch.sampler_logp - logp)
        found[f"teacher/{name}/teacher_logp"] = float(torch.cat(logps).mean())
        if len(gaps) == len(logps):
            found[f"teacher/{name}/reverse_kl_estimate"] = float(torch.cat(gaps).mean())
    return found


def scored_batches(
    rollouts: Sequence[Rollout],
    teacher: AnyTeacher,
    kind: TargetKind,
    *,
    shares: Mapping[str, float] | None = None,
    advantages: Sequence[torch.Tensor] | None = None,
    keep: Sequence[torch.Tensor] | None = None,
    **layout: Any,
) -> Sequence[Batch]:
    """Micro-batches with targets; `layout` is what `pack` takes. Hidden states, top-k and sampled log-probs are small and scored at
    once; whole logits are scored when their micro-batch is used, and not kept.

    Rollouts of different teachers share no micro-batch. `shares` are what each teacher's tokens weigh in sum, among the teachers
    that have any.
    """
    if layout.get("global_count") is None:
        layout["global_count"] = count_of(rollouts, layout.get("reduction", "token_mean"), keep)
    groups = teacher.groups(rollouts)
    targets = None if kind == "dense" else teacher.score(rollouts, kind)
    batches: list[Batch] = []
    packed: dict[str, list[Batch]] = {}
    for name, members in groups.items():
        packed[name] = pack(
            [rollouts[i] for i in members],
            None if targets is None else [targets[i] for i in members],
            advantages=None if advantages is None else [advantages[i] for i in members],
            keep=None if keep is None else [keep[i] for i in members],
            **layout,
        )
    for name, group in packed.items():
        group = [dataclasses.replace(b, response_ids=teacher.vocabulary.with_stand_ins(b.response_ids)) for b in group]
        batches += group if shares is None else _weighed(group, _factor(name, packed, shares))
    return batches if kind != "dense" else _ScoredWhenUsed(batches, teacher)


def _factor(name: str, packed: Mapping[str, Sequence[Batch]], shares: Mapping[str, float]) -> float:
    """What this teacher's token weights are multiplied by to have their share of the sum of all; 0 for a share of 0, even alone."""
    sums = {n: sum(float(b.token_weights.double().sum()) for b in group) for n, group in packed.items()}
    present = sum(shares[n] for n, own in sums.items() if own > 0)
    return shares[name] / present * sum(sums.values()) / sums[name] if present and sums[name] else 0.0


def _weighed(batches: Sequence[Batch], factor: float) -> list[Batch]:
    return [dataclasses.replace(b, token_weights=b.token_weights * factor) for b in batches]


class _ScoredWhenUsed(Sequence[Batch]):
    def __init__(self, batches: list[Batch], teacher: AnyTeacher) -> None:
        self._batches = batches
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        targets = self._teacher.score(batch.rollouts, "dense")
        return with_target(batch, concatenate(targets, batch.response_ids.device))
