"""Estimators that see one sampled token per position, y ~ S, with δ = log p(y) − log q(y).

What matters is the expected *gradient*. k1 as a loss: 0. k2 as a loss: ∇ reverse KL. k3 as a loss: ∇ forward KL.
−sg[k1] as an advantage: ∇ reverse KL. −sg[k3] as an advantage: a wrong direction.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int

MAX_LOG_RATIO = 20.0  # exp() overflow guard: e^20 ≈ 5e8 times any sane advantage is finite in float32


def k1(student_logp: Float[Tensor, " tokens"], teacher_logp: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """δ: unbiased for reverse KL, of either sign. Never differentiate it as a loss: its expected gradient is 0."""
    return student_logp - teacher_logp


def k2(student_logp: Float[Tensor, " tokens"], teacher_logp: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """δ²/2: as a loss, its expected gradient is that of reverse KL. Its value is biased."""
    return 0.5 * (student_logp - teacher_logp).square()


def k3(
    student_logp: Float[Tensor, " tokens"],
    teacher_logp: Float[Tensor, " tokens"],
    *,
    floored_logp: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " tokens"]:
    """e^−δ − 1 + δ ≥ 0: unbiased for reverse KL as a value, but as a loss its expected gradient is that of *forward* KL.

    `floored_logp` are the teacher's log-probs raised to a floor: they bound the last δ, whose gradient does not depend on them.
    """
    log_ratio = teacher_logp - student_logp
    bounded = log_ratio if floored_logp is None else floored_logp - student_logp
    return torch.expm1(log_ratio) - bounded


def distillation_advantage(
    student_logp: Float[Tensor, " tokens"], teacher_logp: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """−sg[δ] = log q(y) − log p(y), without gradient: positive where the teacher likes the token better."""
    return -k1(student_logp, teacher_logp).detach()


def value_baseline(reverse_kl: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """−sg[KL(S‖T)], the expectation of the distillation advantage at each position. arXiv 2605.07865.

    Subtract it from the advantage *after* `discounted_return`: it depends on the prefix, so that a later position's baseline
    depends on this position's token, and subtracting it first would cancel the return.
    """
    return -reverse_kl.detach()


def discounted_return(
    advantage: Float[Tensor, " tokens"], sequence_index: Int[Tensor, " tokens"], discount: float
) -> Float[Tensor, " tokens"]:
    """Σ_i γ^i advantage[t+i] to the end of each sequence. The tokens of a sequence are contiguous and in order.

    γ = 0 treats every position by itself (the GKD objective); γ = 1 is the gradient of the sequence-level reverse KL.
    """
    if not 0.0 <= discount <= 1.0:
        raise ObjectiveError(
            f"discount must be between 0 and 1, not {discount}; 0 looks at one token, 1 at the whole rest."
        )
    returns, reach = advantage, 1
    if discount == 0.0 or advantage.numel() == 0:
        return returns
    lengths: Tensor = cast(Any, torch).unique_consecutive(sequence_index, return_counts=True)[1]
    longest = int(lengths.max())
    # After a round, returns[t] holds the first `reach` terms of its sum; adding what stands `reach` later doubles that.
    while reach < longest:
        same_sequence = sequence_index[reach:] == sequence_index[:-reach]
        ahead = torch.where(same_sequence, discount**reach * returns[reach:], 0.0)
        returns = torch.cat([returns[:-reach] + ahead, returns[-reach:]])
        reach *= 2
    return returns


def policy_gradient_loss(
    student_logp: Float[Tensor, " tokens"],
    advantage: Float[Tensor, " tokens"],
    sampler_logp: Float[Tensor, " tokens"] | None = None,
    clip_range: float | tuple[float, float] | None = None,
) -> Float[Tensor, " tokens"]:
    """−r A with r = p(y) / sg[μ(y)], μ the sampling distribution (the student itself when `sampler_logp` is None).

    With `clip_range` ε: −min(r A, clip(r, 1−ε, 1+ε) A), arXiv 1707.06347; a pair is (ε below 1, ε above 1), arXiv 2503.14476.
    """
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if low is not None and high is not None and not (0.0 < low < math.inf and 0.0 < high < math.inf):
        raise ObjectiveError(f"clip_range must be a finite number > 0, not {clip_range}; use None for no clipping.")
    advantage = advantage.detach()
    behaviour = (student_logp if sampler_logp is None else sampler_logp).detach()
    log_ratio = student_logp - torch.where(behaviour == -torch.inf, 0.0, behaviour)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    if low is None or high is None:
        return -ratio * advantage
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)
