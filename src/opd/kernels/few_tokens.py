"""Terms that read the student's log-probs of a few tokens: the policy gradient, cross-entropy, top-k and sampled targets; and the entropy bonus.

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

FEW_ROWS = 128  # on a CPU: what autograd keeps of 64 entries a row is then under a mebibyte


def policy_loss(
    policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """λ_rl · importance · surrogate, its derivative with respect to the response token's log-prob, and 1 where it is clipped."""
    logp = student_logp.detach()
    advantage = policy.advantages.to(logp.dtype)
    if policy.likelihood:
        factor = _factor(policy, logp)
        return factor * _negative_likelihood(logp, advantage), -factor * advantage, torch.zeros_like(logp)
    old = logp if policy.old_log_prob is None else policy.old_log_prob.to(logp.dtype)
    log_ratio = logp - torch.where(old == -torch.inf, 0.0, old)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    loss, moves = -ratio * advantage, log_ratio <= MAX_LOG_RATIO
    clipped, clip = torch.zeros_like(moves), policy.clip_range
    if clip is not None:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        loss = torch.maximum(loss, -ratio.clamp(1.0 - low, 1.0 + high) * advantage)
        clipped = torch.where(advantage >= 0, ratio > 1.0 + high, ratio < 1.0 - low)
    factor = _factor(policy, logp)
    slope = torch.where(moves & ~clipped, -ratio * advantage, 0.0)
    return factor * loss, factor * slope, clipped.to(logp.dtype)


def policy_loss_by_autograd(policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The same loss through `losses`, differentiable in `student_logp`."""
    if policy.likelihood:
        loss = _negative_likelihood(student_logp, policy.advantages.detach().to(student_logp.dtype))
    else:
        loss = policy_gradient_loss(student_logp, policy.advantages, policy.old_log_prob, policy.clip_range)
    if policy.importance_weights is not None:
        loss = policy.importance_weights.detach() * loss
    return policy.weight * loss


def _negative_likelihood(student_logp: Tensor, weight: Tensor) -> Tensor:
    """−weight · log p(y), where −∞ times a weight of 0 is 0."""
    return -weight * torch.where(weight == 0, 0.0, student_logp)


def _factor(policy: PolicyTerm, like: Tensor) -> Tensor:
    """weight · importance of every token."""
    factor = torch.full_like(like, policy.weight)
    return factor if policy.importance_weights is None else factor * policy.importance_weights.to(like.dtype)


def add_few_tokens(
    rows: RowSpec, values: dict[str, Tensor], student_on_k: Float[Tensor, "tokens k"] | None = None
) -> dict[str, Tensor]:
    """Put into `values`, and add to its loss, a top-k or sampled target's term, the policy term and the entropy bonus.

    Returns the derivatives with respect to the student's log-probs: "k_slope" of the top-k tokens, "y_slope" of the response token.
    """
    slopes: dict[str, Tensor] = {}
    if isinstance(rows.target, (TopKTarget, SampledTarget)):
        found = few_tokens_loss(rows, student_on_k, values.get("student_logp"))
        values["divergence"], values["clamped"] = found.pop("divergence"), found.pop("clamped")
        values["loss"] = rows.distill_weight * values["divergence"]
        slopes = {name: rows.distill_weight * slope for name, slope in found.items()}
    if rows.policy is not None:
        values["policy_loss"], slope, values["clipped"] = policy_loss(rows.policy, values["student_logp"])
        values["loss"] = values["loss"] + values["policy_loss"]
        slopes["y_slope"] = slopes["y_slope"] + slope if "y_slope" in slopes else slope
    if rows.entropy_bonus:
        values["loss"] = values["loss"] - rows.entropy_bonus * values["student_entropy"]
    return slopes


def few_tokens_loss(
    rows: RowSpec, student_on_k: Float[Tensor, "tokens k"] | None, student_logp: Float[Tensor, " tokens"] | None
) -> dict[str, Tensor]:
    """The divergence from a top-k or sampled target, the clamped mass, and the derivatives that there are."""
    assert isinstance(rows.target, (TopKTarget, SampledTarget))
    count = max(1, len(rows.target))
    few = count if any(logp is not None and logp.is_cuda for logp in (student_on_k, student_logp)) else FEW_ROWS
    pieces = [slice(first, first + few) for first in range(0, count, few)]
    parts = [_few_rows(rows.at(piece), at(student_on_k, piece), at(student_logp, piece)) for piece in pieces]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _few_rows(rows: RowSpec, student_on_k: Tensor | None, student_logp: Tensor | None) -> dict[str, Tensor]:
    target, given = rows.target, {"k_slope": student_on_k, "y_slope": student_logp}
    leaves = {name: logp.detach().requires_grad_(True) for name, logp in given.items() if logp is not None}
    with torch.enable_grad():
        if isinstance(target, TopKTarget):
            support, y_logp = support_of(target.ids), leaves.get("y_slope")
            on_k = support.mask(leaves["k_slope"])
            loss, clamped = rows.objective.from_top_k(
                on_k, support, target, y_logp, rows.response_ids, rows.sampler_logp
            )
        else:
            assert isinstance(target, SampledTarget)
            loss, clamped = rows.objective.from_sampled(leaves["y_slope"], target.teacher_logp, rows.sampler_logp)
        slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    found = {"divergence": loss.detach().to(next(iter(leaves.values())).dtype), "clamped": clamped.detach()}
    return found | {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}


def token_slopes(rows: RowSpec, slopes: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(ids, derivatives) [rows, k] of what `add_few_tokens` returned."""
    found = []
    if isinstance(rows.target, TopKTarget) and "k_slope" in slopes:
        found.append((rows.target.ids, slopes["k_slope"]))
    if rows.response_ids is not None and "y_slope" in slopes:
        found.append((rows.response_ids.unsqueeze(-1), slopes["y_slope"].unsqueeze(-1)))
    return found
