"""Sections of the reward, and of reinforcement learning with it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from opd.config.rules import at_least, not_negative, positive
from opd.config.sections import Section
from opd.errors import require
from opd.losses.settings import ObjectiveSettings
from opd.losses.weights import Combine, Scale, Schedule, check_combined, linear_schedule

if TYPE_CHECKING:
    from opd.losses import HybridSchedule, Objective


class RewardConfig(Section, key="reward"):
    """Calls of the reward, in training and in evaluation."""

    timeout: float = 10.0
    """Seconds that a reward may take for one response; 0 sets no limit."""
    on_error: Literal["stop", "zero"] = "stop"
    """A reward that raises, takes too long or returns no finite number ends the run, or counts as 0 (metric: reward/failed)."""

    def __post_init__(self) -> None:
        ok = math.isfinite(self.timeout) and self.timeout >= 0
        require(ok, f"reward.timeout must be 0 (no limit) or a positive number of seconds, not {self.timeout}")


class HybridConfig(Section, key="rl"):
    """Weights of distillation and of a reward's loss, and how the two make one. Shared by the recipe and verl's `opd.rl`."""

    weight: float = 0.0
    """λ_rl, the weight of the policy gradient. How responses of different length share it is objective.reduction: sequence_mean is
    GRPO's own, token_mean counts every token alike, fixed removes the bias towards long answers (arXiv 2503.20783)."""
    weight_end: float | None = None
    """λ_rl moves from `weight` to this, linearly; None keeps it."""
    distill_weight: float = 1.0
    """λ_distill, the weight of the distillation loss; 0 is pure reinforcement learning, which needs no teacher."""
    distill_weight_end: float | None = None
    """λ_distill moves from `distill_weight` to this, linearly; None keeps it."""
    schedule_steps: int | None = None
    """Steps that both moves take; None is the whole run."""
    combine: Combine = "losses"
    """With distillation: add the two losses, or the two per-token advantages (objective.delivery=advantage)."""
    scale: Scale = "none"
    """match divides both terms by their standard deviation over the batch before they are weighed: one more forward pass."""

    def __post_init__(self) -> None:
        not_negative(self, "weight", "weight_end", "distill_weight", "distill_weight_end")
        at_least(1, self, "schedule_steps")
        ends = [self.weight if self.weight_end is None else self.weight_end]
        ends.append(self.distill_weight if self.distill_weight_end is None else self.distill_weight_end)
        require(
            max(self.weight, self.distill_weight) > 0 and max(ends) > 0,
            "rl.weight and rl.distill_weight are both 0 at the start or at the end, so there is nothing to train on; make one of them "
            "positive.",
        )
        moves = self.weight_end is not None or self.distill_weight_end is not None
        require(
            self.schedule_steps is None or moves,
            f"rl.schedule_steps={self.schedule_steps} is how long a weight moves, and none does; set rl.weight_end or rl.distill_weight_end, or drop it.",
        )

    @property
    def rewarded(self) -> bool:
        """A reward has a weight at some step."""
        return max(self.weight, self.weight_end or 0.0) > 0

    @property
    def distilled(self) -> bool:
        """A teacher has a weight at some step."""
        return max(self.distill_weight, self.distill_weight_end or 0.0) > 0

    def schedules(self, total_steps: int) -> tuple[Schedule, Schedule]:
        """λ_rl and λ_distill over the run."""
        steps = self.schedule_steps or max(1, total_steps - 1)
        return (
            linear_schedule(self.weight, self.weight_end, steps),
            linear_schedule(self.distill_weight, self.distill_weight_end, steps),
        )

    def weights_at(self, step: int, total_steps: int) -> tuple[float, float]:
        """λ_rl and λ_distill at a step, counted from 0."""
        rl_weight, distill_weight = self.schedules(total_steps)
        return rl_weight.at(step), distill_weight.at(step)


class RlConfig(HybridConfig, key="rl"):
    """Reinforcement learning on the same rollouts, alone or beside distillation. Off while rl.weight is 0."""

    reward: str | None = None
    """As eval.reward, which None takes."""
    advantage: Literal["grpo", "rloo"] = "grpo"
    """grpo: reward minus the mean of its prompt's samples (arXiv 2402.03300); rloo: minus the mean of the others (arXiv 2402.14740)."""
    normalize_std: bool = True
    """grpo: divide by the standard deviation of the prompt's samples; False is arXiv 2503.20783."""
    clip_range: float | None = 0.2
    """ε of the clipped ratio student / sampler, arXiv 1707.06347; None does not clip."""
    clip_high: float | None = None
    """ε above 1, where it differs from the one below (arXiv 2503.14476 uses 0.28)."""
    reference_kl: float = 0.0
    """β of a penalty −β (log p − log p_reference) in each token's advantage; the reference is the student before training: a copy
    of its weights, or, with student.lora, the student without its adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "reference_kl")
        positive(self, "clip_range", "clip_high", unless=", or null for no clipping")
        require(
            self.clip_high is None or self.clip_range is not None,
            "rl.clip_high is the upper end of a clipped ratio, and rl.clip_range=null does not clip; set both or neither.",
        )

    @property
    def clip(self) -> float | tuple[float, float] | None:
        """`Hybrid.clip_range`: one ε, or a pair."""
        if self.clip_range is None or self.clip_high is None:
            return self.clip_range
        return self.clip_range, self.clip_high

    def hybrid(self, objective: Objective, total_steps: int, cross_entropy: float = 0.0) -> HybridSchedule:
        """The loss of every update, with `objective` as its distillation and `rollout.cross_entropy`."""
        from opd.losses import Hybrid, HybridSchedule  # torch comes with them

        rl_weight, distill_weight = self.schedules(total_steps)
        first = Hybrid(
            distill=objective,
            rl_weight=rl_weight.start,
            distill_weight=distill_weight.start,
            combine=self.combine,
            scale=self.scale,
            clip_range=self.clip,
            cross_entropy=cross_entropy,
        )
        return HybridSchedule(first=first, rl_weight=rl_weight, distill_weight=distill_weight)

    def check(self, objective: ObjectiveSettings, *, samples_per_prompt: int) -> None:
        """Raise ConfigError for settings of other sections that a reward cannot work with."""
        if not self.rewarded:
            return
        require(
            samples_per_prompt > 1,
            f"rl.advantage={self.advantage} compares a sample with the others of its prompt, and train.samples_per_prompt=1 leaves "
            "nothing to compare with, so every advantage would be 0. Use 4 or more.",
        )
        require(
            self.reference_kl == 0 or objective.student_temperature == 1,
            f"rl.reference_kl compares log-probs at temperature 1, and objective.student_temperature is {objective.student_temperature}; "
            "set it and rollout.temperature to 1, or rl.reference_kl=0.",
        )
        if self.distilled:
            check_combined(objective, self.combine)
