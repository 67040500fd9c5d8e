"""Hybrid updates: batch-wide standard deviations and advantages needed before the update, and the combined loss from full logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from opd.kernels import PolicyTerm
from opd.kernels.terms import policy_loss, policy_loss_by_autograd
from opd.losses import (
    NO_SPREAD,
    Hybrid,
    Objective,
    TokenLoss,
    combine_advantages,
    mix_losses,
    mix_teachers,
    student_diagnostics,
    to_logp,
)
from opd.types import AnyTarget, Batch, DenseTarget, Target, TeacherMixture

LossOf = Callable[[Batch, Hybrid], tuple[torch.Tensor, TokenLoss]]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Inputs of the update after the preview pass."""

    batches: Sequence[Batch]
    objective: Hybrid
    losses: Sequence[tuple[Batch, TokenLoss]]
    """The distillation term of every micro-batch, without gradient."""
    metrics: dict[str, float]


@torch.no_grad()
def preview(loss_of: LossOf, batches: Sequence[Batch], hybrid: Hybrid) -> Preview:
    """The distillation term over the whole batch, before the update: its spread, and the advantages that it delivers.

    The spread is that of all micro-batches together, so that how they are cut changes nothing.
    """
    # Seen from the student itself the ratio is 1 and cannot be clipped: the loss is −advantage.
    alone = Hybrid(distill=replace(hybrid.distill, clip_range=None))
    # Whole logits are not kept: `batches` may make them anew when they are used.
    losses = [(replace(batch, target=None), loss_of(replace(batch, sampler_logp=None), alone)[1]) for batch in batches]
    counted = [batch.token_weights != 0 for batch, _ in losses]
    distill = _spread([out.loss[kept] for (_, out), kept in zip(losses, counted, strict=True)])
    rl = _spread([_advantages(batch)[kept] for (batch, _), kept in zip(losses, counted, strict=True)])
    metrics = {"rl/advantage_std": rl, "rl/distill_std": distill}
    if hybrid.combine == "losses":
        objective = replace(
            hybrid,
            scale="none",
            rl_weight=hybrid.rl_weight / _divisor(rl),
            distill_weight=hybrid.distill_weight / _divisor(distill),
        )
        return Preview(batches=batches, objective=objective, losses=losses, metrics=metrics)
    joined = [
        replace(
            batch,
            advantages=combine_advantages(
                _advantages(batch),
                -out.loss,
                rl_weight=hybrid.rl_weight,
                distill_weight=hybrid.distill_weight,
                scale=hybrid.scale,
                rl_std=rl,
                distill_std=distill,
            ),
        )
        for batch, out in losses
    ]
    return Preview(
        batches=joined,
        objective=replace(hybrid, scale="none", rl_weight=1.0, distill_weight=0.0),
        losses=losses,
        metrics=metrics,
    )


def _advantages(batch: Batch) -> torch.Tensor:
    assert batch.advantages is not None
    return batch.advantages


def _divisor(spread: float) -> float:
    """As `match_scale` divides: a term without a spread keeps its size."""
    return spread if spread > NO_SPREAD else 1.0


def _spread(parts: Sequence[torch.Tensor]) -> float:
    values = torch.cat([part.double() for part in parts])
    return float(values.std(correction=0)) if len(values) else 0.0


def whole_logits_loss(
    logits: torch.Tensor,
    target: AnyTarget | None,
    batch: Batch,
    hybrid: Hybrid,
    policy: PolicyTerm | None,
    eos_ids: Sequence[int],
) -> TokenLoss:
    """What `kernels.linear_objective` computes, from logits [tokens, vocabulary]."""
    loss, metrics = torch.zeros_like(logits[:, 0]), {}
    if target is None:
        metrics |= student_diagnostics(to_logp(logits.detach()), batch.response_ids)
    else:
        out = _distillation(logits, target, batch, hybrid.distill)
        loss, metrics = hybrid.distill_weight * out.loss, {**out.metrics}
    if policy is not None:
        logp = to_logp(logits, hybrid.distill.student_temperature)
        y_logp = logp.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
        surrogate = policy_loss_by_autograd(policy, y_logp)
        metrics |= {"policy_loss": surrogate.detach(), "clipped": policy_loss(policy, y_logp)[2]}
        loss = loss + surrogate
    eos = torch.tensor([i for i in eos_ids if i < logits.shape[-1]], device=logits.device, dtype=torch.long)
    metrics["eos_prob"] = to_logp(logits.detach())[:, eos].exp().sum(-1)
    return TokenLoss(loss=loss, metrics=metrics)


def _distillation(logits: torch.Tensor, target: AnyTarget, batch: Batch, objective: Objective) -> TokenLoss:
    """`Objective.per_token`, also against several teachers."""

    def against(one: Target) -> TokenLoss:
        return objective.per_token(
            logits, one, batch.response_ids, sampler_logp=batch.sampler_logp, sequence_index=batch.sequence_index
        )

    if not isinstance(target, TeacherMixture):
        return against(target)
    if target.mixture == "loss":
        outs = [against(member) for member in target.targets]
        metrics = {name: mix_losses([out.metrics[name] for out in outs], target.weights) for name in outs[0].metrics}
        return TokenLoss(loss=mix_losses([out.loss for out in outs], target.weights), metrics=metrics)
    temperature = objective.teacher_temperature
    members = [to_logp(member.logits, temperature) for member in target.targets if isinstance(member, DenseTarget)]
    mixed = mix_teachers(members, target.weights, target.mixture)
    return against(DenseTarget(logits=mixed * temperature))  # which is divided by the temperature again
