"""Loss terms whose gradient is known without the whole row: they read the student's log-prob of a few tokens only.

For such a term F, dF/dz = Σ_k F'_k (1[v = k] − p_v): one multiple of p and a few entries. So reinforcement learning and
top-k distillation ride on a row that is in hand anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.request import PolicyTerm, select_target
from opd.losses import Objective, policy_gradient_loss, support_of
from opd.losses._shapes import Float
from opd.losses.sampled import MAX_LOG_RATIO
from opd.types import SampledTarget, TopKTarget

FEW_ROWS = 128  # what autograd keeps of 64 entries a row is then under a mebibyte


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

    def loss(
        self, student_on_k: Float[Tensor, "tokens k"] | None, student_logp: Float[Tensor, " tokens"] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """The loss per token, its derivatives with respect to both arguments, and the clamped mass."""
        rows = [slice(first, first + FEW_ROWS) for first in range(0, max(1, len(self.target)), FEW_ROWS)]
        parts = [self._piece(_at(student_on_k, piece), _at(student_logp, piece), piece) for piece in rows]
        joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert joined[0] is not None and joined[3] is not None
        return joined[0], joined[1], joined[2], joined[3]

    def _piece(
        self, student_on_k: Tensor | None, student_logp: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        target = select_target(self.target, rows)
        ids, sampler = _at(self.response_ids, rows), _at(self.sampler_logp, rows)
        leaves = [None if x is None else x.detach().requires_grad_(True) for x in (student_on_k, student_logp)]
        on_k, y_logp = leaves
        with torch.enable_grad():
            if isinstance(target, TopKTarget):
                assert on_k is not None
                support = support_of(target.ids)
                loss, clamped = self.objective.from_top_k(support.mask(on_k), support, target, y_logp, ids, sampler)
            else:
                assert y_logp is not None and isinstance(target, SampledTarget)
                loss, clamped = self.objective.from_sampled(y_logp, target.teacher_logp, sampler)
            wanted = [leaf for leaf in leaves if leaf is not None]
            found = list(torch.autograd.grad(loss.sum(), wanted, allow_unused=True))
        gradients = [None if leaf is None else found.pop(0) for leaf in leaves]
        return loss.detach().to(wanted[0].dtype), gradients[0], gradients[1], clamped.detach()


def _at(value: Tensor | None, rows: slice) -> Tensor | None:
    return None if value is None else value[rows]
