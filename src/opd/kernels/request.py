"""What a fused loss is asked to compute, and what an implementation answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from opd.kernels.parallel import Shards
from opd.losses import Objective
from opd.losses._shapes import Float
from opd.types import AnyTarget, DenseTarget, HiddenTarget, SampledTarget, TeacherMixture, TopKTarget

Impl = Literal["auto", "reference", "chunked", "triton"]
Memory = Literal["fast", "minimal"]

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


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which gradients are wanted; a product that feeds none of them is not run."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Diagnostics that a trainer wants beside the loss, at temperature 1."""

    target: AnyTarget | None
    """With all its top-k, where the loss reads the first few; None: the student's own numbers alone."""
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rows of weight 0 are gone, every tensor is detached, and everything has been checked."""

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    target: AnyTarget | None
    """None: no distillation, the policy term and the entropy bonus alone."""
    objective: Objective
    token_weights: Float[Tensor, " tokens"]
    response_ids: Tensor | None = None
    sampler_logp: Tensor | None = None
    policy: PolicyTerm | None = None
    entropy_bonus: float = 0.0
    distill_weight: float = 1.0
    vocab: int
    """Columns that exist on both sides, of all shards together; those beyond are padding."""
    masked_ids: tuple[int, ...] = ()
    """Columns below `vocab` that no token owns."""
    needs: Needs
    shards: Shards
    chunk_tokens: int
    memory: Memory = "fast"
    gradient_filter: float | None = None
    watch: Watch | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, divergences and accumulated gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]


@dataclass(kw_only=True)
class Answer:
    """Gradients are of the weighted sum, in the request's dtype; `rows` holds one number per token under each name."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    hidden_grad: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None


def true_infinity(logp: Tensor) -> Tensor:
    """Log-probs in which masked tokens have −inf instead of what stands for it."""
    return torch.where(logp < MASKED / 2, -torch.inf, logp)


def select_target(target: AnyTarget | None, rows: Any) -> AnyTarget | None:
    """The target at some tokens; `rows` is an index tensor or a slice."""
    if isinstance(target, HiddenTarget):
        return HiddenTarget(hidden=target.hidden[rows], head=target.head)
    if isinstance(target, DenseTarget):
        return DenseTarget(logits=target.logits[rows])
    if isinstance(target, TopKTarget):
        y = target.sampled_logp
        return TopKTarget(
            ids=target.ids[rows], teacher_logp=target.teacher_logp[rows], sampled_logp=None if y is None else y[rows]
        )
    if isinstance(target, SampledTarget):
        return SampledTarget(teacher_logp=target.teacher_logp[rows])
    if isinstance(target, TeacherMixture):
        weights = target.weights
        return TeacherMixture(
            targets=tuple(select_target(t, rows) for t in target.targets),  # pyright: ignore[reportArgumentType]
            weights=weights if weights.dim() == 1 else weights[rows],
            mixture=target.mixture,
        )
    return None


def select_policy(policy: PolicyTerm | None, rows: Any) -> PolicyTerm | None:
    """The policy term at some tokens."""
    if policy is None:
        return None
    old, importance = policy.old_log_prob, policy.importance_weights
    return PolicyTerm(
        advantages=policy.advantages[rows],
        old_log_prob=None if old is None else old[rows],
        clip_range=policy.clip_range,
        importance_weights=None if importance is None else importance[rows],
        weight=policy.weight,
    )


def target_has_logits(target: AnyTarget | None) -> bool:
    """Whether the teacher's side is a whole row of logits."""
    return isinstance(target, (HiddenTarget, DenseTarget, TeacherMixture))
