"""Rollouts → micro-batches with everything that the update reads: the teacher's view of them, and the reward's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd.config import RlConfig, TrainConfig
from opd.data.pack import concatenate, count_of, pack, with_target
from opd.errors import DataError, OpdError
from opd.losses import Hybrid, Objective
from opd.ranks import ALONE, Ranks
from opd.rewards import Scorer
from opd.teachers.base import Teacher
from opd.teachers.cache import KeptScores
from opd.teachers.ensemble import Ensemble
from opd.trainer.drop import NONE_LEFT, drop, rewards_of
from opd.trainer.reinforce import Advantages, Reinforcement
from opd.types import AnyTarget, Batch, Rollout, TargetKind


class Batches(Sequence[Batch]):
    """The micro-batches of a step. Lazy ones have their target made by the teacher each time they are used, and not kept."""

    def __init__(self, batches: Sequence[Batch], *, scored_by: Teacher | None = None) -> None:
        """`scored_by` makes them lazy: whole logits of a step need not fit in memory."""
        self._batches = batches
        self._teacher = scored_by

    @property
    def lazy(self) -> bool:
        """True where a target costs a forward pass of the teacher at every use."""
        return self._teacher is not None

    @property
    def unscored(self) -> Sequence[Batch]:
        """The micro-batches; lazy ones without their targets."""
        return self._batches

    def replaced(self, batches: Sequence[Batch]) -> Batches:
        """Other micro-batches in their place, which get targets as these do."""
        return Batches(batches, scored_by=self._teacher)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        if self._teacher is None:
            return batch
        targets = _targets(self._teacher, batch.rollouts, "dense")
        return with_target(batch, concatenate(targets, batch.response_ids.device))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One step's micro-batches (of this rank, where there are several), and what their update minimises."""

    batches: Batches
    objective: Hybrid
    trained_on: int
    """Rollouts of all ranks that the loss sees."""
    rewards: tuple[float, ...] | None = None
    """In the order of the rollouts."""
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    """Warnings for the person who watches the run."""


class StepScorer:
    """Asks the teacher, the reward, or both about the rollouts of a step."""

    def __init__(
        self,
        *,
        objective: Objective,
        rl: RlConfig,
        train: TrainConfig,
        teacher: Teacher | None,
        kind: TargetKind | None,
        ensemble: Ensemble | None = None,
        kept: KeptScores | None = None,
        reinforcement: Reinforcement | None,
        rewards: Scorer | None = None,
        pad_id: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        cross_entropy: float = 0.0,
    ) -> None:
        """`kind` is the one that the teacher's `bind_objective` settled; `ensemble` is the teacher itself where it is several, whose
        weights may move from step to step; `kept` counts what of theirs is kept; `rewards` are for train.drop
        and log.reward where there is no reinforcement; `cross_entropy` is rollout.cross_entropy."""
        self.hybrid = rl.hybrid(objective, train.steps, cross_entropy)
        self.token_fraction = train.token_fraction
        self.teacher = teacher
        self.kind: TargetKind | None = kind
        self.ensemble = ensemble
        self.kept = kept
        self.reinforcement = reinforcement
        self.rewards = rewards
        self.ranks = ranks
        self._drop = self._always_dropped = frozenset[str](train.drop)
        self.layout = {
            "layout": train.layout,
            "tokens_per_microbatch": train.microbatch,
            "pad_id": pad_id,
            "reduction": objective.reduction,
            "global_count": objective.fixed_count,
            "device": device,
        }

    def drop_also(self, kinds: Collection[str]) -> None:
        """From the next step on, leave these kinds of responses out of the loss, beside those of train.drop."""
        self._drop = self._always_dropped | frozenset(kinds)

    def score(self, rollouts: Sequence[Rollout], step: int) -> Scored:
        """Raises DataError for a reward that fails, where the recipe says that this ends the run."""
        if self.kept is None:
            return self._score(rollouts, step)
        self.kept.take()  # of an evaluation
        scored = self._score(rollouts, step)
        metrics = {**scored.metrics, **self.kept.take()}
        return dataclasses.replace(scored, metrics=metrics, notes=(*scored.notes, *self.kept.failures()))

    def _score(self, rollouts: Sequence[Rollout], step: int) -> Scored:
        objective = self.hybrid.at(step)
        signal: Advantages | None = None
        rewards, metrics, notes = None, dict[str, float](), list[str]()
        if objective.rl_weight != 0.0:
            assert self.reinforcement is not None
            signal = self.reinforcement.advantages(rollouts)
            rewards, notes = signal.rewards, list(signal.notes)
            metrics |= signal.metrics
            metrics |= {"rl/weight": objective.rl_weight, "rl/distill_weight": objective.distill_weight}
        elif self.rewards is not None:
            rewards, metrics, notes = rewards_of(rollouts, self.rewards)
        per_token = None if signal is None else signal.per_token
        if self._drop:
            dropped = drop(rollouts, self._drop, rewards)
            metrics |= dropped.metrics
            notes += [] if dropped.left else [NONE_LEFT]
            rollouts = [rollouts[i] for i in dropped.left]
            per_token = None if per_token is None else [per_token[i] for i in dropped.left]
        batches = self._batches(rollouts, step, objective, per_token, metrics) if rollouts else Batches(())
        return Scored(
            batches=batches,
            objective=objective,
            trained_on=len(rollouts),
            rewards=rewards,
            metrics=metrics,
            notes=tuple(notes),
        )

    def _batches(
        self,
        rollouts: Sequence[Rollout],
        step: int,
        objective: Hybrid,
        advantages: Sequence[torch.Tensor] | None,
        metrics: dict[str, float],
    ) -> Batches:
        """The micro-batches of the rollouts that are trained on; what is found about their tokens is put into `metrics`."""
        keep = None if self.token_fraction == 1 else top_entropy_mask(rollouts, self.token_fraction)
        readable = None if self.teacher is None else readable_mask(rollouts, self.teacher)
        if readable is not None:
            metrics["unheard_tokens"] = float(sum(int((~tokens).sum()) for tokens in readable))
            keep = readable if keep is None else [one & other for one, other in zip(keep, readable, strict=True)]
        count = count_of(rollouts, self.layout["reduction"], keep)
        mine = self.ranks.share([len(r.prompt_ids) + len(r.response_ids) for r in rollouts])
        layout = {
            **self.layout,
            "global_count": self.layout["global_count"] or count,
            "advantages": None if advantages is None else [advantages[i] for i in mine],
            "keep": None if keep is None else [keep[i] for i in mine],
        }
        if objective.distill_weight == 0.0:
            return Batches(pack([rollouts[i] for i in mine], None, **layout))
        return self._taught(rollouts, mine, step, layout, metrics)

    def _taught(
        self,
        rollouts: Sequence[Rollout],
        mine: Sequence[int],
        step: int,
        layout: Mapping[str, Any],
        metrics: dict[str, float],
    ) -> Batches:
        """Micro-batches of this rank's rollouts with the teacher's targets; the metrics of an ensemble's members, over all rollouts, are
        put into `metrics`."""
        assert self.teacher is not None and self.kind is not None
        own = [rollouts[i] for i in mine]
        if self.ensemble is None:
            return scored_batches(own, self.teacher, self.kind, **layout)
        ensemble = self.ensemble.at(step)
        batches = scored_batches(own, ensemble, self.kind, shares=ensemble.shares, ranks=self.ranks, **layout)
        metrics |= ensemble.member_metrics(rollouts, None if batches.lazy else batches, self.ranks)
        return batches


def top_entropy_mask(rollouts: Sequence[Rollout], fraction: float) -> list[torch.Tensor]:
    """For every rollout, which tokens are in this share of the step's tokens, those of the highest entropy (arXiv 2506.01939); at
    least one is."""
    sizes = [len(r.response_ids) for r in rollouts]
    if any(r.sampler_entropy is None for r in rollouts):
        raise DataError(
            f"train.token_fraction={fraction} keeps the tokens of highest entropy, and the sampler gives none. Set "
            "Rollout.sampler_entropy in it, or train.token_fraction=1."
        )
    entropy = torch.tensor([h for r in rollouts for h in r.sampler_entropy or ()])
    kept = torch.zeros(len(entropy), dtype=torch.bool)
    kept[entropy.argsort(descending=True, stable=True)[: math.ceil(fraction * len(entropy))]] = True
    return list(kept.split(sizes))


def readable_mask(rollouts: Sequence[Rollout], teacher: Teacher) -> list[torch.Tensor] | None:
    """For every rollout, which tokens the teacher can judge; None where that is all, as it is for samplers of ours.

    Left out are ids that are no token of both models, such as rows that pad the output layer, and what stands after one that the
    teacher has no row for.
    """
    vocabulary, rows = teacher.vocabulary, teacher.rows
    masks = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.response_ids)
        unreadable = (ids >= rows).long()
        masks.append(vocabulary.owns(ids) & (unreadable.cumsum(0) == unreadable))
    return None if all(bool(tokens.all()) for tokens in masks) else masks


def scored_batches(
    rollouts: Sequence[Rollout],
    teacher: Teacher,
    kind: TargetKind,
    *,
    shares: Mapping[str, float] | None = None,
    ranks: Ranks = ALONE,
    advantages: Sequence[torch.Tensor] | None = None,
    keep: Sequence[torch.Tensor] | None = None,
    **layout: Any,
) -> Batches:
    """Micro-batches with targets; `layout` is what `pack` takes. Hidden states, top-k and sampled log-probs are small and scored at
    once; whole logits are scored when their micro-batch is used, and not kept.

    Rollouts of different groups share no micro-batch. `shares` are what each group's tokens weigh in sum, among the groups that have
    any on any rank: with shares, every rank has to ask.
    """
    if layout.get("global_count") is None:
        layout["global_count"] = count_of(rollouts, layout.get("reduction", "token_mean"), keep)
    targets = None if kind == "dense" or not rollouts else _targets(teacher, rollouts, kind)
    batches: list[Batch] = []
    packed: dict[str, list[Batch]] = {}
    for name, members in teacher.groups(rollouts).items():
        packed[name] = pack(
            [rollouts[i] for i in members],
            None if targets is None else [targets[i] for i in members],
            advantages=None if advantages is None else [advantages[i] for i in members],
            keep=None if keep is None else [keep[i] for i in members],
            **layout,
        )
    sums = {} if shares is None else _sums(packed, ranks)
    for name, group in packed.items():
        group = [dataclasses.replace(b, response_ids=teacher.vocabulary.with_stand_ins(b.response_ids)) for b in group]
        batches += group if shares is None else _weighed(group, _factor(name, sums, shares))
    return Batches(batches, scored_by=teacher if kind == "dense" else None)


def _targets(teacher: Teacher, rollouts: Sequence[Rollout], kind: TargetKind) -> Sequence[AnyTarget]:
    targets = teacher.score(rollouts, kind)
    if len(targets) != len(rollouts):
        raise OpdError(
            f"{type(teacher).__name__}.score returned {len(targets)} targets for {len(rollouts)} rollouts; it has to return one each, in "
            "order."
        )
    return targets


def _sums(packed: Mapping[str, Sequence[Batch]], ranks: Ranks) -> dict[str, float]:
    """The sum of every group's token weights, over all ranks."""
    whole: dict[str, float] = {}
    own = {n: sum(float(b.token_weights.double().sum()) for b in group) for n, group in packed.items()}
    for sums in ranks.gather(own):
        whole = {n: whole.get(n, 0.0) + sums.get(n, 0.0) for n in {**whole, **sums}}
    return whole


def _factor(name: str, sums: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Factor of a group's token weights that gives them their share of the sum of all; 0 for a share of 0, even alone."""
    present = sum(shares[n] for n, own in sums.items() if own > 0)
    return shares[name] / present * sum(sums.values()) / sums[name] if present and sums[name] else 0.0


def _weighed(batches: Sequence[Batch], factor: float) -> list[Batch]:
    return [dataclasses.replace(b, token_weights=b.token_weights * factor) for b in batches]
