"""Weights of a loss's terms: their schedules, and the rules about what can be added. Imports no torch, so that a recipe is checked
without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opd.errors import ObjectiveError
from opd.losses.settings import ObjectiveSettings

Scale = Literal["none", "match"]

Combine = Literal["losses", "advantages"]

WEIGHT_SUM_TOLERANCE = 1e-3  # weights may come from a file or from bfloat16


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The weight of one term over the course of training."""

    kind: Literal["constant", "linear"] = "constant"
    """constant stays at `start`; linear goes from `start` to `end` in `steps` steps and stays there."""
    start: float = 1.0
    """Weight at step 0."""
    end: float = 1.0
    """Weight from step `steps` on; read by linear only."""
    steps: int = 1
    """Optimizer steps from `start` to `end`; read by linear only."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear"):
            raise ObjectiveError(f"schedule kind={self.kind!r} is not one of constant, linear.")
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.steps >= 1):
            raise ObjectiveError(f"a schedule needs finite weights and steps ≥ 1, but got {self}.")

    def at(self, step: int) -> float:
        """Weight at this optimizer step."""
        if self.kind == "constant" or step <= 0:
            return self.start
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


def linear_schedule(start: float, end: float | None, steps: int) -> Schedule:
    """From `start` to `end` in so many steps; constant without an end."""
    return Schedule(start=start) if end is None else Schedule(kind="linear", start=start, end=end, steps=steps)


def check_weights(rl_weight: float, distill_weight: float) -> None:
    """Raise ObjectiveError for weights of the two terms that are not finite, or both 0."""
    if not (math.isfinite(rl_weight) and math.isfinite(distill_weight)):
        raise ObjectiveError(f"weights must be finite, but got rl_weight={rl_weight}, distill_weight={distill_weight}.")
    if rl_weight == 0.0 and distill_weight == 0.0:
        raise ObjectiveError(
            "rl_weight and distill_weight are both 0: nothing is left to train on; make one of them positive."
        )


def check_combined(distill: ObjectiveSettings, combine: Combine) -> None:
    """Raise ObjectiveError for a distillation that cannot be added to a reward in this way."""
    if combine == "advantages" and distill.delivery != "advantage":
        raise ObjectiveError(
            "combine='advantages' adds the distillation advantage to the reward's, but the objective has delivery='loss'; set "
            "delivery=advantage with support=sampled and estimator=k1, or combine=losses."
        )
    if combine == "losses" and distill.discount > 0:
        raise ObjectiveError(
            f"discount={distill.discount} makes the distillation a policy gradient of its own; beside a reward set "
            "combine=advantages, or discount=0."
        )
