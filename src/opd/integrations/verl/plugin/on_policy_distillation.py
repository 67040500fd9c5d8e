"""On-policy distillation as a policy loss of verl: `actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation`.

The student is trained on its own samples to say what a frozen teacher would say at every token. Functions take whole logits, student
first; log-probs and divergences are in nats and in float32 (float64 when given it). ON_POLICY_DISTILLATION.md explains the rest.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, register_policy_loss

from opd.config.sections import parse_section
from opd.errors import ConfigError, NonFiniteError, ObjectiveError
from opd.integrations.verl.plugin.concept_names import LOSS_MODE
from opd.integrations.verl.plugin.logits import TokenLosses, token_losses
from opd.integrations.verl.plugin.policy_loss_config import check_config, read_config
from opd.integrations.verl.plugin.settings import (
    DistillationSettings,
    LossMixture,
    LossWeights,
    TeacherModel,
    settings_of,
)
from opd.losses import Objective

__all__ = [
    "LOSS_MODE",
    "DistillationSettings",
    "check_config",
    "compute_hybrid_distillation_loss",
    "compute_multi_teacher_distillation_loss",
    "compute_on_policy_distillation_loss",
    "forward_kl_loss",
    "generalized_jsd_loss",
    "gkd",
    "reverse_kl_loss",
    "settings_of",
]

Losses = tuple[Tensor, Tensor, Tensor, Tensor]
"""(loss, clip fraction, KL, lower clip fraction), each a scalar; only the loss can be differentiated."""


def reverse_kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher) = Σ p (log p − log q) at each position: [..., vocab] logits in, [...] nats out. Mode-seeking."""
    return _per_token(student_logits, teacher_logits, "reverse_kl", temperature)


def forward_kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) = Σ q (log q − log p) at each position: [..., vocab] logits in, [...] nats out. Mean-seeking."""
    return _per_token(student_logits, teacher_logits, "forward_kl", temperature)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """β KL(teacher ‖ M) + (1−β) KL(student ‖ M), M = β teacher + (1−β) student, at each position; arXiv 2306.13649.

    Divided by β(1−β) when `normalize`, so that β → 0 is forward KL and β → 1 reverse KL; the published form fades at both ends.
    """
    return _per_token(student_logits, teacher_logits, "generalized_jsd", temperature, beta=beta, normalize=normalize)


def gkd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ β·teacher + (1−β)·student) at each position: reverse KL at β = 1, identically 0 at β = 0."""
    return _per_token(student_logits, teacher_logits, "skew_reverse_kl", temperature, beta=beta)


@register_policy_loss(LOSS_MODE)
def compute_on_policy_distillation_loss(
    old_log_prob: Tensor | None,
    log_prob: Tensor | None,
    advantages: Tensor | None,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    teacher_logits: Tensor | Sequence[Tensor] | None = None,
    student_logits: Tensor | None = None,
) -> Losses:
    """λ_rl · policy loss + λ_distill · divergence, as `config` says: verl's ActorConfig, or its keys in a dict, an OmegaConf node or a
    namespace; None is pure reverse KL.

    This is what verl's registry holds as `on_policy_distillation`. verl's trainers hand a policy loss no logits: in training
    `OnPolicyDistillation` takes its place. Logits are [sequences, response, vocab], raw, and row t predicts response token t; the others are [sequences, response]. With
    λ_rl = 0 the first three are not read and may be None. The KL returned is the mean KL(student ‖ teacher) at temperature 1,
    whatever is trained; the clip fractions are those of the policy loss, 0 without one. A sequence of teachers is mixed by
    `config.policy_loss.opd.mixture`. Raises ObjectiveError for missing or misshapen logits, NonFiniteError
    for a NaN or infinite loss.
    """
    settings, config = read_config(config)
    told = _Call(response_mask, loss_agg_mode, config, (old_log_prob, log_prob, advantages), rollout_is_weights)
    return told.total(settings, teacher_logits, student_logits)


def compute_hybrid_distillation_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    teacher_logits: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    lambda_rl: float = 1.0,
    lambda_distill: float = 1.0,
) -> Losses:
    """`compute_on_policy_distillation_loss` with both weights given here. verl's policy loss reads its clip ratios in `config`."""
    settings, config = read_config(config)
    settings = replace(settings, rl=LossWeights(weight=lambda_rl, distill_weight=lambda_distill))
    told = _Call(response_mask, loss_agg_mode, config, (old_log_prob, log_prob, advantages), rollout_is_weights)
    return told.total(settings, teacher_logits, student_logits)


def compute_multi_teacher_distillation_loss(
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    *,
    teacher_logits: Sequence[Tensor],
    student_logits: Tensor,
    teacher_weights: Sequence[float] | None = None,
    mixture: str = "probability",
) -> Losses:
    """Pure distillation from several teachers: q = Σ w q_i (probability), log q ∝ Σ w log q_i (logit), or Σ w D(student, q_i) (loss)."""
    settings, config = read_config(config)
    names = [f"teacher {i}" for i in range(len(teacher_logits))]
    if teacher_weights is not None and len(teacher_weights) != len(names):
        raise ConfigError(
            f"{len(teacher_weights)} teacher_weights for {len(names)} teachers; give each one, with a sum of 1."
        )
    weights = dict(zip(names, map(float, teacher_weights or ()), strict=False))
    settings = replace(
        settings,
        teacher=None,
        teachers={name: TeacherModel(model=name) for name in names},
        mixture=parse_section(LossMixture, {"kind": mixture, "weights": weights}, "mixture."),
        rl=replace(settings.rl, weight=0.0),
    )
    return _Call(response_mask, loss_agg_mode, config).total(settings, teacher_logits, student_logits)


def _per_token(student: Tensor, teacher: Tensor, name: str, temperature: float, **shape: Any) -> Tensor:
    objective = Objective(divergence=name, student_temperature=temperature, teacher_temperature=temperature, **shape)  # pyright: ignore[reportArgumentType]
    _check_logits(student, [teacher])
    flat, others = student.flatten(0, -2), [teacher.flatten(0, -2)]
    return token_losses(flat, others, objective, watch=False).loss.view(student.shape[:-1])


@dataclass(frozen=True)
class _Call:
    """What verl hands a policy loss."""

    response_mask: Tensor
    loss_agg_mode: str
    config: Any
    rl: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """Old log-probs, log-probs and advantages."""
    rollout_is_weights: Tensor | None = None

    def total(
        self,
        settings: DistillationSettings,
        teacher_logits: Tensor | Sequence[Tensor] | None,
        student_logits: Tensor | None,
    ) -> Losses:
        if student_logits is None or teacher_logits is None:
            raise ObjectiveError(
                f"the policy loss {LOSS_MODE} was called without teacher_logits and student_logits. In training, verl's FSDP engine hands "
                "them over: with the patch, is it applied whole (apply_patch.sh --check), and actor.strategy fsdp or fsdp2? With the package "
                "opd, start with +opd=default."
            )
        info = {} if self.config is None else dict(self.config.global_batch_info)
        found, mask = self._divergences(settings, teacher_logits, student_logits)

        def mean(values: Tensor) -> Tensor:
            everywhere, counts = values.new_zeros(mask.shape).masked_scatter(mask, values), mask.to(values.dtype)
            return agg_loss(loss_mat=everywhere, loss_mask=counts, loss_agg_mode=self.loss_agg_mode, **info)

        loss = settings.rl.distill_weight * mean(found.loss)
        if not loss.isfinite():
            raise NonFiniteError(
                f"the distillation loss is not finite, at {int((~found.loss.isfinite()).sum())} of {len(found.loss)} response tokens: student "
                "or teacher gives NaN, or the teacher rules out a token that the student gives some probability."
            )
        clipped = clipped_lower = loss.detach().new_zeros(())
        if settings.trains_rl:
            policy, metrics = self._policy_loss(settings.hybrid_loss_mode)
            loss = loss + settings.rl.weight * policy
            clipped, clipped_lower = (
                torch.as_tensor(metrics.get(f"actor/{name}", 0.0), device=loss.device, dtype=loss.dtype).detach()
                for name in ("pg_clipfrac", "pg_clipfrac_lower")
            )
        return loss, clipped, mean(found.metrics["reverse_kl"]).detach(), clipped_lower

    def _divergences(
        self, settings: DistillationSettings, teacher_logits: Tensor | Sequence[Tensor], student_logits: Tensor
    ) -> tuple[TokenLosses, Tensor]:
        teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
        _check_logits(student_logits, teachers)
        mask = self.response_mask.bool()
        if mask.shape != student_logits.shape[:-1]:
            raise ObjectiveError(
                f"response_mask is {tuple(mask.shape)}, but student_logits are {tuple(student_logits.shape)}; cut the logits to the responses "
                "first: row t predicts response token t."
            )
        found = token_losses(
            student_logits.flatten(0, -2),
            [t.flatten(0, -2) for t in teachers],
            settings.objective.loss(),
            positions=mask.flatten().nonzero().squeeze(-1),
            teacher_weights=torch.tensor(settings.shares(len(teachers)), dtype=torch.float64),
            mixture=settings.mixture.kind,
        )
        return found, mask

    def _policy_loss(self, loss_mode: str) -> tuple[Tensor, dict[str, Any]]:
        if self.config is None or any(value is None for value in self.rl):
            raise ConfigError(
                "a hybrid loss (hybrid_lambda_rl > 0) needs old_log_prob, log_prob, advantages and verl's actor config, where the clip ratios "
                "are; pass them, or set hybrid_lambda_rl=0."
            )
        given = dict(zip(("old_log_prob", "log_prob", "advantages"), self.rl, strict=True))
        given |= {"response_mask": self.response_mask, "loss_agg_mode": self.loss_agg_mode, "config": self.config}
        return get_policy_loss_fn(loss_mode)(**given, rollout_is_weights=self.rollout_is_weights)


def _check_logits(student: Tensor, teachers: Sequence[Tensor]) -> None:
    for teacher in teachers:
        if student.dim() < 2 or teacher.shape[:-1] != student.shape[:-1]:
            raise ObjectiveError(
                f"student_logits are {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}; both must be [..., vocab] at the "
                "same positions."
            )
