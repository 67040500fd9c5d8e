"""Distillation together with a reward: advantages of the reward, schedules of the weights, and `Hybrid`.

A term whose weight is 0 is left out, so that the result is bit for bit the other term alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int
from opd.losses.objective import Objective
from opd.losses.weights import Combine, Scale, Schedule, check_combined, check_weights

STD_FLOOR = 1e-6  # added to a group's standard deviation before dividing, as arXiv 2402.03300's implementations do
NO_SPREAD = 1e-6  # a term that varies less over the batch is rounding (of float32 nats), and rounding is not scaled up


def group_relative_advantage(
    rewards: Float[Tensor, " sequences"], group_index: Int[Tensor, " sequences"], normalize_std: bool = True
) -> Float[Tensor, " sequences"]:
    """Reward minus the mean of its group, divided by the group's standard deviation when `normalize_std`.

    arXiv 2402.03300; without the division arXiv 2503.20783. The standard deviation is over n − 1; a group of one, or of equal
    rewards, gets exactly 0.
    """
    groups = int(group_index.max()) + 1 if group_index.numel() else 0
    wide = rewards.double()
    lowest = wide.new_zeros(groups).scatter_reduce(0, group_index, wide, "amin", include_self=False)
    wide = wide - lowest[group_index]  # equal rewards are exactly 0, whatever the rounding of their mean
    zeros = torch.zeros(groups, dtype=wide.dtype, device=wide.device)
    size = zeros.index_add(0, group_index, torch.ones_like(wide))
    mean = zeros.index_add(0, group_index, wide) / size.clamp(min=1)
    centred = wide - mean[group_index]
    if normalize_std:
        variance = zeros.index_add(0, group_index, centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group_index] + STD_FLOOR)
    return centred.to(rewards.dtype)


def leave_one_out_advantage(
    rewards: Float[Tensor, " sequences"], group_index: Int[Tensor, " sequences"]
) -> Float[Tensor, " sequences"]:
    """Reward minus the mean of the *other* rewards of its group (RLOO, arXiv 2402.14740): n / (n − 1) times the centred reward."""
    centred = group_relative_advantage(rewards, group_index, normalize_std=False)
    size = torch.bincount(group_index, minlength=1).to(centred)[group_index]
    return centred * size / (size - 1).clamp(min=1)


def match_scale(values: Float[Tensor, " tokens"], std: float | Tensor | None = None) -> Float[Tensor, " tokens"]:
    """values / sg[std], or as they are where the spread is mere rounding. Give `std` when the batch is split, so that every part divides
    by the same number."""
    if std is None:
        std = values.detach().std(correction=0) if values.numel() else 1.0
    std = torch.as_tensor(std, dtype=values.dtype, device=values.device).detach()
    return values / torch.where(std > NO_SPREAD, std, 1.0)


def combine_advantages(
    rl_advantage: Float[Tensor, " tokens"],
    distill_advantage: Float[Tensor, " tokens"],
    *,
    rl_weight: float,
    distill_weight: float,
    scale: Scale = "none",
    rl_std: float | Tensor | None = None,
    distill_std: float | Tensor | None = None,
) -> Float[Tensor, " tokens"]:
    """λ_rl A_rl + λ_distill A_distill, per token; with scale='match' each A is first divided by its batch std."""
    if scale not in get_args(Scale):
        raise ObjectiveError(f"scale={scale!r} is not one of {', '.join(get_args(Scale))}.")
    check_weights(rl_weight, distill_weight)
    if rl_weight == 0.0:
        return distill_weight * distill_advantage
    if distill_weight == 0.0:
        return rl_weight * rl_advantage
    if scale == "match":
        rl_advantage, distill_advantage = match_scale(rl_advantage, rl_std), match_scale(distill_advantage, distill_std)
    return rl_weight * rl_advantage + distill_weight * distill_advantage


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """The loss of one update: λ_distill · distillation + λ_rl · clipped policy gradient, or + λ_ce · cross-entropy with responses that the
    student did not draw. A term of weight 0 is not computed."""

    distill: Objective = field(default_factory=Objective)
    distill_weight: float = 1.0
    """λ_distill."""
    rl_weight: float = 0.0
    """λ_rl."""
    combine: Combine = "losses"
    """Add the two losses, or the two per-token advantages (then `distill` delivers one)."""
    scale: Scale = "none"
    """match divides each term by its standard deviation over the batch first."""
    clip_range: float | tuple[float, float] | None = None
    """Of the policy gradient: ε, or (low, high)."""
    cross_entropy: float = 0.0
    """λ_ce, the weight of −log p(y) at the tokens y of responses that come from elsewhere than the student."""

    def __post_init__(self) -> None:
        check_weights(self.rl_weight, self.distill_weight)
        if not (math.isfinite(self.cross_entropy) and self.cross_entropy >= 0):
            raise ObjectiveError(f"cross_entropy={self.cross_entropy} must be a number ≥ 0; 0 leaves it out.")
        if self.cross_entropy and self.rl_weight:
            raise ObjectiveError(
                f"cross_entropy={self.cross_entropy} is about responses of others, and rl_weight={self.rl_weight} about the student's own; set one "
                "of them to 0."
            )
        if self.mixed:
            check_combined(self.distill, self.combine)

    @property
    def mixed(self) -> bool:
        """Both terms have a weight."""
        return self.rl_weight != 0.0 and self.distill_weight != 0.0

    @property
    def needs_preview(self) -> bool:
        """The distillation term must be known over the whole batch before the update."""
        return self.mixed and (self.scale == "match" or self.combine == "advantages")


@dataclass(frozen=True, kw_only=True)
class HybridSchedule:
    """The loss of every update of a run, in which the two weights may move."""

    first: Hybrid
    """The loss at step 0."""
    rl_weight: Schedule
    distill_weight: Schedule

    def at(self, step: int) -> Hybrid:
        """The loss of this step's update."""
        return replace(self.first, rl_weight=self.rl_weight.at(step), distill_weight=self.distill_weight.at(step))


def as_hybrid(objective: Objective | Hybrid) -> Hybrid:
    """The hybrid itself, or distillation alone from a plain objective."""
    return objective if isinstance(objective, Hybrid) else Hybrid(distill=objective)
