"""Loss terms whose gradient is known without the whole row: they read the student's log-prob of a few tokens only.

For such a term F, dF/dz = Σ_k F'_k (1[v = k] − p_v): one multiple of p and a few entries. So reinforcement learning and
top-k distillation ride on a row that is in hand anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.request import PolicyTerm
from opd.losses import Objective, Support, policy_gradient_loss, support_of
from opd.losses._shapes import Float
from opd.losses.sampled import MAX_LOG_RATIO
from opd.types import SampledTarget, TopKTarget


def clip_bounds(clip_range: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """(1 − low, 1 + high)."""
    if clip_range is None:
        return None
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    return 1.0 - low, 1.0 + high


def policy_loss(
    policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """λ_rl · importance · surrogate, its derivative with respect to the response token's log-prob, and 1 where it is clipped."""
    logp = student_logp.detach()
    advantage = policy.advantages.to(logp.dtype)
    old = logp if policy.old_log_prob is None else policy.old_log_prob.to(logp.dtype)
    log_ratio = logp - torch.where(old == -torch.inf, 0.0, old)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    loss, moves = -ratio * advantage, log_ratio <= MAX_LOG_RATIO
    bounds = clip_bounds(policy.clip_range)
    clipped = torch.zeros_like(moves)
    if bounds is not None:
        loss = torch.maximum(loss, -ratio.clamp(*bounds) * advantage)
        clipped = torch.where(advantage >= 0, ratio > bounds[1], ratio < bounds[0])
    factor = torch.full_like(logp, policy.weight)
    if policy.importance_weights is not None:
        factor = factor * policy.importance_weights.to(logp.dtype)
    slope = torch.where(moves & ~clipped, -ratio * advantage, 0.0)
    return factor * loss, factor * slope, clipped.to(logp.dtype)


def policy_loss_by_autograd(policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The same loss through `losses`, differentiable in `student_logp`."""
    loss = policy_gradient_loss(student_logp, policy.advantages, policy.old_log_prob, policy.clip_range)
    if policy.importance_weights is not None:
        loss = policy.importance_weights.detach() * loss
    return policy.weight * loss


class FewTokens:
    """A distillation loss that needs the student's log-probs of a teacher's top-k, or of the response token alone."""

    def __init__(
        self,
        objective: Objective,
        target: TopKTarget | SampledTarget,
        response_ids: Tensor | None,
        sampler_logp: Tensor | None,
    ) -> None:
        self.objective = objective
        self.target = target
        self.response_ids = response_ids
        self.sampler_logp = sampler_logp
        self.support: Support | None = support_of(target.ids) if isinstance(target, TopKTarget) else None

    def loss(
        self, student_on_k: Float[Tensor, "tokens k"] | None, student_logp: Float[Tensor, " tokens"] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """The loss per token, its derivatives with respect to both arguments, and the clamped mass."""
        leaves = [None if x is None else x.detach().requires_grad_(True) for x in (student_on_k, student_logp)]
        on_k, y_logp = leaves
        with torch.enable_grad():
            if isinstance(self.target, TopKTarget):
                assert on_k is not None and self.support is not None
                loss, clamped = self.objective.from_top_k(
                    self.support.mask(on_k), self.support, self.target, y_logp, self.response_ids, self.sampler_logp
                )
            else:
                assert y_logp is not None
                loss, clamped = self.objective.from_sampled(y_logp, self.target.teacher_logp, self.sampler_logp)
            wanted = [leaf for leaf in leaves if leaf is not None]
            found = list(torch.autograd.grad(loss.sum(), wanted, allow_unused=True))
        gradients = [None if leaf is None else found.pop(0) for leaf in leaves]
        return loss.detach().to(wanted[0].dtype), gradients[0], gradients[1], clamped.detach()
