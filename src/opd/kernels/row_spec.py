"""The specification of a row: what is computed for each token from its logits, whoever holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.kernels.parallel import Columns
from opd.losses import Objective
from opd.losses._shapes import Float
from opd.types import AnyTarget, DenseTarget, HiddenTarget, SampledTarget, TeacherMixture, TopKTarget

MASKED = -1e30  # a logit whose probability is 0, and which, unlike −inf, may be subtracted from itself


@dataclass(frozen=True, kw_only=True)
class PolicyTerm:
    """Reinforcement learning on the same rows: weight · importance · clipped surrogate, arXiv 1707.06347.

    −min(r A, clip(r, 1−low, 1+high) A) with r = p(y) / old(y), y the response token and p the student at its loss temperature.
    """

    advantages: Float[Tensor, " tokens"]
    """A, without gradient."""
    old_log_prob: Float[Tensor, " tokens"] | None = None
    """log old(y) in nats; None means the student itself, r = 1."""
    clip_range: float | tuple[float, float] | None = None
    """ε, or (low, high); None does not clip."""
    importance_weights: Float[Tensor, " tokens"] | None = None
    """Factor per token, for example a truncated trainer / rollout probability ratio; without gradient."""
    weight: float = 1.0
    """λ_rl."""

    def at(self, index: Any) -> PolicyTerm:
        """The term at some tokens."""
        return replace(
            self,
            advantages=self.advantages[index],
            old_log_prob=at(self.old_log_prob, index),
            importance_weights=at(self.importance_weights, index),
        )


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The metrics that a trainer wants beside the loss, at temperature 1."""

    target: AnyTarget | None
    """With all its top-k, where the loss reads the first few; None: the student's own numbers alone."""
    eos_ids: tuple[int, ...] = ()
    """Ids below the common vocabulary's size, whose probability is summed up."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """loss = distill_weight · D(S, T) + policy − entropy_bonus · H(S), for each token; all tensors are detached and checked."""

    columns: Columns
    objective: Objective
    target: AnyTarget | None
    """None: no distillation, the policy term and the entropy bonus alone."""
    response_ids: Tensor | None = None
    sampler_logp: Tensor | None = None
    sequence_index: Tensor | None = None
    """Read by a discount, which only whole logits can have."""
    policy: PolicyTerm | None = None
    entropy_bonus: float = 0.0
    distill_weight: float = 1.0
    diagnostics: Diagnostics | None = None

    @property
    def has_extras(self) -> bool:
        """True if there is a policy term or an entropy bonus."""
        return self.policy is not None or self.entropy_bonus != 0.0

    def at(self, index: Any, *, whole_targets: bool = True) -> RowSpec:
        """The specification at some tokens. Row passes get a target's logits as an argument: without `whole_targets` it is left out."""
        seen = self.diagnostics
        if seen is not None:
            seen = replace(seen, target=_target_at(seen.target, index, whole_targets))
        return replace(
            self,
            target=_target_at(self.target, index, whole_targets),
            response_ids=at(self.response_ids, index),
            sampler_logp=at(self.sampler_logp, index),
            sequence_index=at(self.sequence_index, index),
            policy=None if self.policy is None else self.policy.at(index),
            diagnostics=seen,
        )


def at(value: Tensor | None, index: Any) -> Tensor | None:
    """value[index], where there is a value."""
    return None if value is None else value[index]


def restore_neg_inf(logp: Tensor) -> Tensor:
    """Log-probs in which masked tokens have −inf again instead of MASKED."""
    return torch.where(logp < MASKED / 2, -torch.inf, logp)


def select_target(target: AnyTarget | None, index: Any) -> AnyTarget | None:
    """The target at some tokens; `index` is an index tensor or a slice."""
    if isinstance(target, HiddenTarget):
        return replace(target, hidden=target.hidden[index])
    if isinstance(target, DenseTarget):
        return replace(target, logits=target.logits[index])
    if isinstance(target, TopKTarget):
        return TopKTarget(
            ids=target.ids[index],
            teacher_logp=target.teacher_logp[index],
            sampled_logp=at(target.sampled_logp, index),
        )
    if isinstance(target, SampledTarget):
        return replace(target, teacher_logp=target.teacher_logp[index])
    if isinstance(target, TeacherMixture):
        members = tuple(select_target(member, index) for member in target.targets)
        weights = target.weights if target.weights.dim() == 1 else target.weights[index]
        return replace(target, targets=members, weights=weights)
    return None


def _target_at(target: AnyTarget | None, index: Any, whole_targets: bool) -> AnyTarget | None:
    return select_target(target, index) if whole_targets or not target_has_logits(target) else None


def target_has_logits(target: AnyTarget | None) -> bool:
    """True if the teacher's side is a whole row of logits."""
    return isinstance(target, (HiddenTarget, DenseTarget, TeacherMixture))
