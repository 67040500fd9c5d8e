"""λ_rl and λ_distill of one update: their schedules, and the division of both terms by their standard deviations."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from opd.integrations.verl.plugin.settings import Settings
from opd.losses import NO_SPREAD


class Weights(NamedTuple):
    """The weights of one update."""

    rl: float
    distill: float

    @property
    def mixed(self) -> bool:
        return self.rl > 0 and self.distill > 0


def scheduled(settings: Settings, engine: Any) -> Weights:
    """The weights of the coming update. verl's learning-rate scheduler counts the trainer's steps, and is part of its checkpoints."""
    if settings.rl.weight_end is None and settings.rl.distill_weight_end is None:
        return Weights(settings.rl.weight, settings.rl.distill_weight)
    step, steps = engine.lr_scheduler.last_epoch, engine.optimizer_config.total_training_steps
    return Weights(*settings.rl.weights_at(step, steps))


class Spread:
    """The standard deviations of both terms over the response tokens of a mini-batch, however it is cut."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, advantages: Tensor, term: Tensor) -> None:
        """One number per token each: verl's advantage, minus which its policy loss is at ratio 1, and the distillation's loss."""
        one, other = advantages.double().cpu(), term.detach().double().cpu()
        self.sums += torch.stack([torch.tensor(float(len(one)), dtype=torch.float64), one.sum(), one.square().sum(),
                                  other.sum(), other.square().sum()])  # fmt: skip

    def stds(self, group: Any) -> tuple[float, float]:
        """(of the advantages, of the distillation), over all ranks of the group; every rank has to ask."""
        everyone: list[Tensor] = [self.sums] * dist.get_world_size(group)
        dist.all_gather_object(everyone, self.sums, group=group)
        count, *sums = torch.stack(everyone).sum(0).tolist()
        return _std(count, sums[0], sums[1]), _std(count, sums[2], sums[3])


def matched(weights: Weights, stds: tuple[float, float]) -> Weights:
    """Both terms divided by their standard deviation; one that has none keeps its size (opd.losses.match_scale)."""
    rl, distill = (std if std > NO_SPREAD else 1.0 for std in stds)
    return Weights(weights.rl / rl, weights.distill / distill)


def _std(count: float, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else 0.0
