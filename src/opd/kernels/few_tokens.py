"""Terms that read the student's log-probs of a few tokens: the policy gradient, top-k targets, sampled targets; and the entropy bonus.

A term F of a few tokens' log-probs alone has dF/dz = Σ_k F'_k (1[v = k] − p_v): one multiple of p and a few entries. So reinforcement
learning and top-k distillation ride on a row that is in hand anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.spec import PolicyTerm, RowSpec, at
from opd.losses import policy_gradient_loss, support_of
from opd.losses._shapes import Float
from opd.losses.sampled import MAX_LOG_RATIO
from opd.types import SampledTarget, TopKTarget

FEW_ROWS = 128  # what autograd keeps of 64 entries a row is then under a mebibyte


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
    clipped, clip = torch.zeros_like(moves), policy.clip_range
    if clip is not None:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        loss = torch.maximum(loss, -ratio.clamp(1.0 - low, 1.0 + high) * advantage)
        clipped = torch.where(advantage >= 0, ratio > 1.0 + high, ratio < 1.0 - low)
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


def few_tokens_loss(
    rows: RowSpec, student_on_k: Float[Tensor, "tokens k"] | None, student_logp: Float[Tensor, " tokens"] | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The divergence from a top-k or sampled target, its derivatives with respect to both arguments, and the clamped mass."""
    assert isinstance(rows.target, (TopKTarget, SampledTarget))
    parts = []
    for first in range(0, max(1, len(rows.target)), FEW_ROWS):
        piece = slice(first, first + FEW_ROWS)
        parts.append(_few_rows(rows.at(piece), at(student_on_k, piece), at(student_logp, piece)))
    loss, k_slope, y_slope, clamped = zip(*parts, strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in (k_slope, y_slope)]  # pyright: ignore[reportArgumentType]
    return torch.cat(loss), joined[0], joined[1], torch.cat(clamped)


def _few_rows(
    rows: RowSpec, student_on_k: Tensor | None, student_logp: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    target, sampler = rows.target, rows.sampler_logp
    leaves = [None if x is None else x.detach().requires_grad_(True) for x in (student_on_k, student_logp)]
    on_k, y_logp = leaves
    with torch.enable_grad():
        if isinstance(target, TopKTarget):
            assert on_k is not None
            support = support_of(target.ids)
            loss, clamped = rows.objective.from_top_k(
                support.mask(on_k), support, target, y_logp, rows.response_ids, sampler
            )
        else:
            assert y_logp is not None and isinstance(target, SampledTarget)
            loss, clamped = rows.objective.from_sampled(y_logp, target.teacher_logp, sampler)
        present = [leaf for leaf in leaves if leaf is not None]
        found = list(torch.autograd.grad(loss.sum(), present, allow_unused=True))
    gradients = [None if leaf is None else found.pop(0) for leaf in leaves]
    return loss.detach().to(present[0].dtype), gradients[0], gradients[1], clamped.detach()


def add_policy_and_entropy(rows: RowSpec, values: dict[str, Tensor]) -> None:
    """Add the policy term and the entropy bonus, where there are any, to the loss in `values`."""
    if rows.policy is not None:
        values["policy_loss"], _, values["clipped"] = policy_loss(rows.policy, values["student_logp"])
        values["loss"] = values["loss"] + values["policy_loss"]
    if rows.entropy_bonus:
        values["loss"] = values["loss"] - rows.entropy_bonus * values["student_entropy"]


def token_slopes(
    rows: RowSpec, values: dict[str, Tensor], k_slope: Tensor | None, y_slope: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(ids, derivatives with respect to the student's log-probs of these) [rows, k], of the distillation and the policy term."""
    if rows.policy is not None:
        more = policy_loss(rows.policy, values["student_logp"])[1]
        y_slope = more if y_slope is None else y_slope + more
    adds = [(rows.target.ids, k_slope)] if k_slope is not None and isinstance(rows.target, TopKTarget) else []
    if y_slope is not None and rows.response_ids is not None:
        adds.append((rows.response_ids.unsqueeze(-1), y_slope.unsqueeze(-1)))
    return adds
