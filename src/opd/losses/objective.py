"""`Objective`: a distillation loss, computed from student logits and what the teacher supplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int
from opd.losses.diagnostics import token_diagnostics
from opd.losses.divergences import full_divergence, to_logp
from opd.losses.groups import first_of, merge_tokens
from opd.losses.partial import (
    SampledToken,
    Support,
    gather_logp,
    partial_divergence,
    support_of,
    top_k_support,
    union_support,
)
from opd.losses.sampled import discounted_return, distillation_advantage, k2, k3, policy_gradient_loss, value_baseline
from opd.losses.settings import ObjectiveSettings
from opd.losses.targets import NO_SAMPLED_LOGP, dense_from_hidden, teacher_logp_of
from opd.types import DenseTarget, HiddenTarget, SampledTarget, Target, TopKTarget


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Loss and diagnostics of every response token."""

    loss: Float[Tensor, " tokens"]
    """Differentiable, in nats unless T² or another divergence says otherwise; neither masked nor averaged."""
    metrics: Mapping[str, Float[Tensor, " tokens"]]
    """Without gradient, always at temperature 1. `clamped` is the student's probability of the tokens whose teacher
    log-prob was raised to `teacher_logp_floor` (0 or 1 where only the response token is looked at), and 1 where `token_clip` bounds
    the token."""


@dataclass(frozen=True, kw_only=True)
class Objective(ObjectiveSettings):
    """A distillation loss. Combinations of settings that cannot work are refused when the object is made.

    Where `sampler_logp` is a parameter, it corrects tail='sampled' and the policy gradient for tokens that were not drawn from this
    very student. `sequence_index` is needed when discount > 0.
    """

    def per_token(
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        target: Target,
        response_ids: Int[Tensor, " tokens"],
        *,
        sampler_logp: Float[Tensor, " tokens"] | None = None,
        sequence_index: Int[Tensor, " tokens"] | None = None,
    ) -> TokenLoss:
        """Loss and diagnostics of every response token. Logits are the student's predictions *of* the response tokens."""
        plain: Any = dense_from_hidden(target) if isinstance(target, HiddenTarget) else target
        student_logits, plain, response_ids = self.merged(student_logits, plain, response_ids)
        loss, clamped = self.per_token_loss(
            student_logits, plain, response_ids, sampler_logp=sampler_logp, sequence_index=sequence_index
        )
        metrics = token_diagnostics(to_logp(student_logits.detach()), plain, response_ids, self.top_k)
        return TokenLoss(loss=loss, metrics={**metrics, "clamped": clamped})

    def per_token_loss(
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        target: Target,
        response_ids: Int[Tensor, " tokens"],
        *,
        sampler_logp: Float[Tensor, " tokens"] | None = None,
        sequence_index: Int[Tensor, " tokens"] | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """The loss of every response token and its `clamped` metric, without the other diagnostics."""
        if isinstance(target, HiddenTarget):
            target = dense_from_hidden(target)
        self._check_inputs(student_logits, target, response_ids)
        self.check_given(sampler_logp, sequence_index)
        student_logits, target, response_ids = self.merged(student_logits, target, response_ids)
        student_logp = to_logp(student_logits, self.student_temperature)
        if self.support == "full" and isinstance(target, DenseTarget):
            teacher_logp, clamped = self._floored(student_logp, to_logp(target.logits, self.teacher_temperature))
            alpha, beta, normalize = self.shape
            loss = full_divergence(
                self.divergence, student_logp, teacher_logp, alpha=alpha, beta=beta, normalize=normalize
            )
            loss, clamped = self._bounded(loss, clamped)
        elif self.support == "sampled":
            loss, clamped = self._sampled(student_logp, target, response_ids, sampler_logp, sequence_index)
        else:
            loss, clamped = self._partial(student_logp, target, response_ids, sampler_logp)
        return (loss * self.student_temperature**2 if self.scale_by_t2 else loss), clamped

    def merged(self, student_logits: Tensor, target: Any, response_ids: Tensor) -> tuple[Tensor, Any, Tensor]:
        """With `eos_groups`, logits whose groups are one token each, and the response ids among them; else what was given."""
        groups = self.eos_groups
        if not groups:
            return student_logits, target, response_ids
        if max(token for group in groups for token in group) >= student_logits.shape[-1]:
            raise ObjectiveError(
                f"eos_groups={groups} names tokens beyond the {student_logits.shape[-1]} entries that both models have; drop those."
            )
        if isinstance(target, DenseTarget):
            target = DenseTarget(logits=merge_tokens(target.logits, groups))
        return merge_tokens(student_logits, groups), target, first_of(response_ids, groups)

    def from_top_k(
        self,
        student_on_k: Float[Tensor, "tokens k"],
        support: Support,
        target: TopKTarget,
        student_logp: Float[Tensor, " tokens"] | None,
        response_ids: Int[Tensor, " tokens"] | None,
        sampler_logp: Float[Tensor, " tokens"] | None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Loss and `clamped` from the student's log-probs on a support: no more of the student is needed.

        `student_logp` and `response_ids` are of the response token and read by tail='sampled' and include_sampled only. T² is not
        applied.
        """
        teacher_on_k, y_logq = support.mask(target.teacher_logp), None
        if self.tail == "sampled" or self.include_sampled:
            y_logq = target.sampled_logp
            if y_logq is None:
                raise ObjectiveError(NO_SAMPLED_LOGP)
        if self.include_sampled:
            assert y_logq is not None and student_logp is not None and response_ids is not None
            support = support_of(_joined(support.ids, response_ids))
            student_on_k = support.mask(_joined(student_on_k, student_logp))
            teacher_on_k = support.mask(_joined(teacher_on_k, y_logq))
        return self._on_support(student_on_k, teacher_on_k, support, student_logp, y_logq, response_ids, sampler_logp)

    def from_sampled(
        self,
        student_logp: Float[Tensor, " tokens"],
        teacher_logp: Float[Tensor, " tokens"],
        sampler_logp: Float[Tensor, " tokens"] | None = None,
        *,
        sequence_index: Int[Tensor, " tokens"] | None = None,
        reverse_kl: Float[Tensor, " tokens"] | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Loss and `clamped` from the response token's log-probs; `reverse_kl` is what baseline='value' subtracts."""
        y_logq, clamped = self._floored(student_logp.unsqueeze(-1), teacher_logp.unsqueeze(-1))
        y_logq, clamped = y_logq.squeeze(-1), (clamped > 0).to(student_logp.dtype)
        if self.estimator in ("k2", "k3"):
            loss = self._k2_or_k3(student_logp, teacher_logp, y_logq)
            if self.token_clip is not None:  # an infinite loss must not meet the 0 that its gradient is multiplied with
                above = loss.detach() > self.token_clip
                parts = (torch.where(above, 0.0, logp) for logp in (student_logp, teacher_logp, y_logq))
                loss = torch.where(above, self.token_clip, self._k2_or_k3(*parts))
                clamped = torch.where(above, 1.0, clamped)
            return loss, clamped
        advantage = distillation_advantage(student_logp, y_logq)
        if self.discount > 0 and sequence_index is not None:
            advantage = discounted_return(advantage, sequence_index, self.discount)
        if self.baseline == "value":
            assert reverse_kl is not None
            advantage = advantage - value_baseline(reverse_kl)
        advantage, clamped = self.bounded_advantage(advantage, clamped)
        return policy_gradient_loss(student_logp, advantage, sampler_logp, self.clip_range), clamped

    def bounded_advantage(self, advantage: Tensor, clamped: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages between ±`token_clip`, and `clamped` with 1 where that changes them; as they are without one."""
        if self.token_clip is None:
            return advantage, clamped
        return advantage.clamp(-self.token_clip, self.token_clip), torch.where(
            advantage.abs() > self.token_clip, 1.0, clamped
        )

    def _bounded(self, loss: Tensor, clamped: Tensor) -> tuple[Tensor, Tensor]:
        """Losses up to `token_clip`, and `clamped` with 1 above it, where there is no gradient."""
        if self.token_clip is None:
            return loss, clamped
        above = loss.detach() > self.token_clip
        return torch.where(above, self.token_clip, loss), torch.where(above, 1.0, clamped)

    def _k2_or_k3(self, student_logp: Tensor, teacher_logp: Tensor, floored_logp: Tensor) -> Tensor:
        if self.estimator == "k2":
            return k2(student_logp, floored_logp)
        return k3(
            student_logp, teacher_logp, floored_logp=floored_logp
        )  # q, from which the gradient comes, is not raised

    def _check_inputs(self, student_logits: Tensor, target: object, response_ids: Tensor) -> None:
        if not isinstance(target, (DenseTarget, TopKTarget, SampledTarget)):
            raise ObjectiveError(
                f"the target is a {type(target).__name__}; wrap what the teacher says, e.g. opd.types.DenseTarget(logits=…)."
            )
        self.check_target(target)
        tokens, vocab = student_logits.shape
        if not tokens == len(target) == response_ids.shape[0]:
            raise ObjectiveError(
                f"{tokens} rows of student logits, {len(target)} of the target and {response_ids.shape[0]} response tokens; "
                "all three must be the response tokens of the same rollouts, in the same order."
            )
        if isinstance(target, DenseTarget) and target.logits.shape[-1] != vocab:
            raise ObjectiveError(
                f"student logits have {vocab} vocabulary entries, teacher logits {target.logits.shape[-1]}; cut both to the "
                "tokens they share and set padding to −inf, because entries are compared by position."
            )
        if isinstance(target, TopKTarget) and target.ids.numel() and int(target.ids.max()) >= vocab:
            raise ObjectiveError(
                f"the teacher names token {int(target.ids.max())}, but the student has {vocab} vocabulary entries; both must "
                "use the same tokenizer."
            )

    def _floored(self, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher log-probs with the floor, and the student's probability of the tokens it raised."""
        if self.teacher_logp_floor is None:
            return teacher_logp, torch.zeros(student_logp.shape[0], device=student_logp.device)
        raised = (teacher_logp < self.teacher_logp_floor) & (student_logp > -torch.inf)
        clamped = torch.where(raised, student_logp.detach().exp(), 0.0).sum(dim=-1)
        return torch.where(raised, self.teacher_logp_floor, teacher_logp), clamped

    def _partial(
        self, student_logp: Tensor, target: Target, response_ids: Tensor, sampler_logp: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.top_k is not None
        if isinstance(target, TopKTarget):
            kept = target.teacher_logp.topk(min(self.top_k, target.ids.shape[-1]), dim=-1)
            ids, known, teacher_logp = target.ids.gather(-1, kept.indices), kept.values, None
            if self.include_sampled:
                ids, known = _joined(ids, response_ids), _joined(known, teacher_logp_of(response_ids, target, None))
            support = support_of(ids)
            teacher_on_k = support.mask(known)
        else:
            assert isinstance(target, DenseTarget)
            teacher_logp = to_logp(target.logits, self.teacher_temperature)
            support = self._choose_support(student_logp, teacher_logp, self.top_k)
            if self.include_sampled:
                support = support_of(_joined(support.ids, response_ids))
            teacher_on_k = support.gather(teacher_logp)
        y_logp = y_logq = None
        if self.tail == "sampled":
            y_logp = gather_logp(student_logp, response_ids)
            y_logq = teacher_logp_of(response_ids, target, teacher_logp)
        student_on_k = support.gather(student_logp)
        return self._on_support(student_on_k, teacher_on_k, support, y_logp, y_logq, response_ids, sampler_logp)

    def _on_support(
        self,
        student_on_k: Tensor,
        teacher_on_k: Tensor,
        support: Support,
        y_logp: Tensor | None,
        y_logq: Tensor | None,
        response_ids: Tensor | None,
        sampler_logp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        raised, clamped = self._floored(student_on_k, teacher_on_k)
        sampled = None
        if y_logp is not None and y_logq is not None and response_ids is not None and self.tail == "sampled":
            outside = ~support.contains(response_ids)
            y_logq, y_clamped = self._floored(y_logp.unsqueeze(-1), y_logq.unsqueeze(-1))
            clamped = clamped + outside * (y_clamped > 0)
            sampled = SampledToken(
                student_logp=y_logp, teacher_logp=y_logq.squeeze(-1), in_support=~outside, sampler_logp=sampler_logp
            )
        assert self.tail is not None
        alpha, beta, normalize = self.shape
        loss = partial_divergence(
            self.divergence,
            student_on_k,
            teacher_on_k,
            floored_logp=raised,
            tail=self.tail,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            sampled=sampled,
        )
        return self._bounded(loss, clamped)

    def _choose_support(self, student_logp: Tensor, teacher_logp: Tensor, k: int) -> Support:
        if self.support == "union":
            return union_support(student_logp, teacher_logp, k, self.always_include)
        chooser = student_logp if self.support == "student_top_k" else teacher_logp
        return top_k_support(chooser, k, self.always_include)

    def _sampled(
        self,
        student_logp: Tensor,
        target: Target,
        response_ids: Tensor,
        sampler_logp: Tensor | None,
        sequence_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        teacher_logp = to_logp(target.logits, self.teacher_temperature) if isinstance(target, DenseTarget) else None
        y_logp = gather_logp(student_logp, response_ids)
        y_logq = teacher_logp_of(response_ids, target, teacher_logp)
        known = None
        if self.baseline == "value":
            known = self._known_reverse_kl(student_logp.detach(), target, teacher_logp)
        return self.from_sampled(y_logp, y_logq, sampler_logp, sequence_index=sequence_index, reverse_kl=known)

    def _known_reverse_kl(self, student_logp: Tensor, target: Target, teacher_logp: Tensor | None) -> Tensor:
        """KL(S‖T), coarsened to the teacher's top-k when that is all there is."""
        if teacher_logp is not None:
            return full_divergence("reverse_kl", student_logp, self._floored(student_logp, teacher_logp)[0])
        assert isinstance(target, TopKTarget)
        support = support_of(target.ids)
        student_on_k = support.gather(student_logp)
        teacher_on_k = support.mask(target.teacher_logp)
        raised = self._floored(student_on_k, teacher_on_k)[0]
        return partial_divergence("reverse_kl", student_on_k, teacher_on_k, floored_logp=raised)


def _joined(on_k: Tensor, of_response: Tensor) -> Tensor:
    """[tokens, k + 1]: what is known of a support, and then of the response token."""
    return torch.cat([on_k, of_response.unsqueeze(-1)], dim=-1)
