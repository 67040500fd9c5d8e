"""The keys of `actor_rollout_ref.actor.policy_loss` that on-policy distillation reads, and every config that would go wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opd.errors import ConfigError
from opd.losses import Objective

LOSS_MODE = "on_policy_distillation"
PREFIX = "actor/distillation/"
"""Prefix of the metrics."""
TYPES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "gkd": "skew_reverse_kl",
    "generalized_jsd": "generalized_jsd",
}
"""`distillation_type`, and what `losses` calls it. gkd is KL(student ‖ β·teacher + (1−β)·student)."""
READS_BETA = ("gkd", "generalized_jsd")
STRATEGIES = ("fsdp", "fsdp2")
MIXTURES = ("probability", "logit", "loss")
KEY = "actor_rollout_ref.actor.policy_loss"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run's distillation."""

    distillation_type: str = "reverse_kl"
    distillation_temperature: float = 1.0
    """Student's and teacher's raw logits are divided by it; the rollout temperature has no part in the loss."""
    distillation_beta: float = 0.5
    hybrid_lambda_rl: float = 0.0
    hybrid_lambda_distill: float = 1.0
    hybrid_loss_mode: str = "vanilla"
    """The policy loss that hybrid_lambda_rl weighs, by its name in verl's registry."""
    teacher_path: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    teacher_mixture: str = "probability"
    teacher_offload: bool = False
    teacher_trust_remote_code: bool = False
    distillation_trace: str | None = None

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise ConfigError(f"{KEY}.{complaint}")

    def _complaints(self) -> Iterator[str]:
        if self.distillation_type not in TYPES:
            yield f"distillation_type={self.distillation_type!r} is not known; use one of {', '.join(TYPES)}."
        temperature = self.distillation_temperature
        if not (math.isfinite(temperature) and temperature > 0):
            yield f"distillation_temperature={temperature} must be a finite number > 0; 1.0 leaves the logits as they are."
        if not 0.0 <= self.distillation_beta <= 1.0:
            yield f"distillation_beta={self.distillation_beta} must be between 0 (student) and 1 (teacher): it is a mixture."
        if self.distillation_type == "gkd" and self.distillation_beta == 0:
            yield "distillation_beta=0 with gkd is KL(student ‖ student), identically 0; 1 is reverse KL."
        for name in ("hybrid_lambda_rl", "hybrid_lambda_distill"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                yield f"{name}={value} must be a finite number ≥ 0; a negative weight would push away from the goal."
        if self.hybrid_lambda_distill == 0:
            yield "hybrid_lambda_distill=0 leaves nothing to distil; use loss_mode=vanilla for reinforcement learning alone."
        if self.hybrid_loss_mode == LOSS_MODE:
            yield "hybrid_loss_mode is the policy loss beside distillation; name another, for example vanilla."
        if self.teacher_mixture not in MIXTURES:
            yield f"teacher_mixture={self.teacher_mixture!r} is not one of {', '.join(MIXTURES)}."
        weights = self.teacher_weights
        if weights and (len(weights) != len(self.teacher_path) or min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-6):
            yield f"teacher_weights={list(weights)}: give each of the {len(self.teacher_path)} teachers one ≥ 0, with a sum of 1."

    @property
    def trains_rl(self) -> bool:
        return self.hybrid_lambda_rl > 0

    def objective(self) -> Objective:
        name = TYPES[self.distillation_type]
        beta = {"beta": self.distillation_beta} if self.distillation_type in READS_BETA else {}
        temperature = self.distillation_temperature
        return Objective(divergence=name, student_temperature=temperature, teacher_temperature=temperature, **beta)  # pyright: ignore[reportArgumentType]

    def shares(self, teachers: int) -> Sequence[float]:
        """The weight of each of so many teachers."""
        return self.teacher_weights or [1.0 / max(1, teachers)] * teachers


def settings_of(policy_loss: Any) -> Settings:
    """From verl's PolicyLossConfig, a mapping of the same keys, or None for the defaults. Raises ConfigError."""
    values = {}
    for name in Settings.__dataclass_fields__:
        value = None if policy_loss is None else policy_loss.get(name, None)
        if value is None:
            continue
        if name == "teacher_path":
            value = (value,) if isinstance(value, str) else tuple(str(v) for v in value)
        if name == "teacher_weights":
            value = tuple(float(v) for v in value)
        values[name] = value
    return Settings(**values)


def check_config(actor: Any) -> None:
    """What verl's ActorConfig calls when it is made, on the driver and in every worker. Raises ConfigError."""
    settings = settings_of(actor.policy_loss)
    if actor.strategy not in STRATEGIES:
        raise ConfigError(
            f"loss_mode={LOSS_MODE} with actor.strategy={actor.strategy}: the hook that hands logits to the loss is in verl's FSDP engine "
            f"only; use one of {', '.join(STRATEGIES)}."
        )
    if not settings.teacher_path:
        raise ConfigError(f"{KEY}.teacher_path is not set; give the teacher's folder or hub name.")
    engine = actor.get("fsdp_config", None)
    if max(actor.get("ulysses_sequence_parallel_size", 1), getattr(engine, "ulysses_sequence_parallel_size", 1)) > 1:
        raise ConfigError(
            f"loss_mode={LOSS_MODE} with sequence parallelism: teacher and student logits would be shards of a sequence; set "
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1."
        )
    if getattr(engine, "pad_to_length", False):
        raise ConfigError(f"loss_mode={LOSS_MODE} with fsdp_config.pad_to_length: switch pad_to_length off.")
    if actor.get("use_fused_kernels", False):
        raise ConfigError(
            f"loss_mode={LOSS_MODE} needs logits, and fused kernels make none; set actor_rollout_ref.model.use_fused_kernels=False."
        )
    if not settings.trains_rl and (actor.entropy_coeff or actor.use_kl_loss):
        raise ConfigError(
            "entropy_coeff and use_kl_loss belong to the policy loss, which hybrid_lambda_rl=0 leaves out; set "
            f"{KEY}.hybrid_lambda_rl above 0, or entropy_coeff=0 use_kl_loss=False."
        )
