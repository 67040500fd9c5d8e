"""A model whose log-probs on response tokens are compared with the teacher's: its forward pass, and its loss on a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from opd.kernels import (
    Memory,
    PolicyTerm,
    linear_objective,
    linear_views,
    objective_from_logits,
    views_from_logits,
)
from opd.kernels.spec import select_target
from opd.losses import Hybrid, Objective, TokenLoss, as_hybrid, weighted_sum
from opd.models import linear_head, output_layer, response_hidden, response_logits
from opd.teachers.local import mask_vocabulary
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.details import ViewCollector
from opd.trainer.guardrails import check_loss
from opd.trainer.metrics import POLICY_MEANS, TokenMetrics
from opd.types import AnyTarget, Batch, DenseTarget, HiddenTarget, TeacherMixture

LOG_PROB_CHUNK = 1024  # tokens whose logits are there at once


class Policy:
    """A model whose log-probs on response tokens are compared with the teacher's."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: VocabularyMatch,
        eos_ids: Sequence[int],
        teacher_logits: Callable[[HiddenTarget], torch.Tensor],
        autocast: bool = False,
        loss_memory: Memory = "fast",
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.eos_ids = tuple(eos_ids)
        self.teacher_logits = teacher_logits
        self.autocast_dtype = torch.bfloat16 if autocast else None
        self.loss_memory: Memory = loss_memory
        self.head_is_a_product = linear_head(model) is not None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bfloat16 matrix products when the recipe asks for them."""
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            yield

    def logits(self, batch: Batch) -> torch.Tensor:
        """All logits [tokens, common vocabulary] that predict each response token."""
        with self.autocast():
            return mask_vocabulary(response_logits(self.model, batch.sequences), self.vocabulary)

    @torch.no_grad()
    def log_prob(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Log-prob of every response token, by logits that are cut to the common vocabulary, a chunk of them at a time."""
        if not self.head_is_a_product:
            rows = self.logits(batch) / temperature
            return rows.float().log_softmax(-1).gather(-1, batch.response_ids[:, None])[:, 0]
        with self.autocast():
            hidden = response_hidden(self.model, batch.sequences)
        head, found = output_layer(self.model), []
        for start in range(0, len(hidden), LOG_PROB_CHUNK):
            part = slice(start, start + LOG_PROB_CHUNK)
            logits = mask_vocabulary(head(hidden[part].to(head.weight.dtype)), self.vocabulary).float() / temperature
            found.append(logits.log_softmax(-1).gather(-1, batch.response_ids[part, None])[:, 0])
        return torch.cat(found) if found else hidden.new_empty(0)

    def loss(
        self, batch: Batch, objective: Objective | Hybrid, metrics: TokenMetrics, watch: ViewCollector | None = None
    ) -> torch.Tensor:
        """Σ token_weights · per-token loss of one micro-batch; `watch` gets both models' views of its rollouts. Raises NonFiniteError naming
        the first bad sample."""
        total, out = self.token_loss(batch, objective, watch)
        if not out.loss.isfinite().all():
            check_loss(out.loss, batch, as_hybrid(objective).distill)
        metrics.add(batch, out)
        return total

    @property
    def token_loss(self) -> Callable[..., tuple[torch.Tensor, TokenLoss]]:
        """The function of micro-batch, objective and `watch` that gives the weighted sum, which can be differentiated, and what it is made of."""
        return self._fused if self.head_is_a_product else self._materialized

    def _fused(
        self, batch: Batch, objective: Objective | Hybrid, watch: ViewCollector | None = None
    ) -> tuple[torch.Tensor, TokenLoss]:
        """From hidden states: neither model's logits exist for more than a chunk of tokens."""
        hybrid = as_hybrid(objective)
        target = self._target(batch, hybrid, dense=False)
        with self.autocast():
            hidden = response_hidden(self.model, batch.sequences)
            head = output_layer(self.model)
            hidden = hidden.to(head.weight.dtype)
            total, per_token, metrics = linear_objective(
                hidden,
                head.weight,
                target,
                batch.response_ids,
                hybrid.distill,
                token_weights=batch.token_weights,
                policy=_policy(batch, hybrid),
                distill_weight=hybrid.distill_weight,
                bias=head.bias,
                valid_vocab=self.vocabulary.size,
                masked_ids=self.vocabulary.invalid_ids,
                sampler_logp=batch.sampler_logp,
                sequence_index=batch.sequence_index,
                eos_ids=self.eos_ids,
                memory=self.loss_memory,
            )
            if watch is not None and (rows := watch.rows(batch)) is not None:
                views = linear_views(
                    hidden[rows],
                    head.weight,
                    select_target(target, rows),
                    batch.response_ids[rows],
                    bias=head.bias,
                    valid_vocab=self.vocabulary.size,
                    masked_ids=self.vocabulary.invalid_ids,
                    teacher_temperature=hybrid.distill.teacher_temperature,
                )
                watch.add(batch, rows, views)
        return total, TokenLoss(loss=per_token, metrics=_told(metrics, hybrid))

    def _materialized(
        self, batch: Batch, objective: Objective | Hybrid, watch: ViewCollector | None = None
    ) -> tuple[torch.Tensor, TokenLoss]:
        """From whole logits, for a model that does more than a product after its last hidden state (a soft-cap, a scale)."""
        hybrid = as_hybrid(objective)
        target = self._target(batch, hybrid, dense=True)
        logits = self.logits(batch)
        loss, metrics = objective_from_logits(
            logits,
            target,
            batch.response_ids,
            hybrid.distill,
            policy=_policy(batch, hybrid),
            distill_weight=hybrid.distill_weight,
            sampler_logp=batch.sampler_logp,
            sequence_index=batch.sequence_index,
            eos_ids=self.eos_ids,
        )
        if watch is not None and (rows := watch.rows(batch)) is not None:
            own, temperature = select_target(target, rows), hybrid.distill.teacher_temperature
            views = views_from_logits(logits[rows], own, batch.response_ids[rows], teacher_temperature=temperature)
            watch.add(batch, rows, views)
        return weighted_sum(loss, batch.token_weights), TokenLoss(loss=loss, metrics=_told(metrics, hybrid))

    def _target(self, batch: Batch, hybrid: Hybrid, *, dense: bool) -> AnyTarget | None:
        """The batch's target, where distillation has a say; hidden states as logits where they are on another device, or `dense`."""
        if hybrid.distill_weight == 0.0:
            return None
        assert batch.target is not None
        return self._here(batch.target, dense)

    def _here(self, target: AnyTarget, dense: bool) -> AnyTarget:
        if isinstance(target, TeacherMixture):
            return replace(target, targets=tuple(self._here(member, dense) for member in target.targets))
        if isinstance(target, HiddenTarget) and (dense or target.head.weight.device != self.device):
            return DenseTarget(logits=self.teacher_logits(target).to(self.device))
        return target


def no_teacher(_target: HiddenTarget) -> torch.Tensor:
    """The `teacher_logits` of a student that has no teacher."""
    raise AssertionError("a run without a teacher has no hidden targets")


def _told(metrics: dict[str, torch.Tensor], hybrid: Hybrid) -> dict[str, torch.Tensor]:
    """Without those of a policy gradient where the term in its place is a cross-entropy, which `student_logp` tells."""
    if hybrid.rl_weight != 0.0:
        return metrics
    return {name: value for name, value in metrics.items() if name not in POLICY_MEANS}


def _policy(batch: Batch, hybrid: Hybrid) -> PolicyTerm | None:
    if hybrid.cross_entropy > 0.0:
        others = [float(rollout.source != "student") for rollout in batch.rollouts]
        weights = torch.tensor(others, device=batch.sequence_index.device)[batch.sequence_index]
        return PolicyTerm(advantages=weights, weight=hybrid.cross_entropy, likelihood=True)
    if hybrid.rl_weight == 0.0:
        return None
    assert batch.advantages is not None
    return PolicyTerm(
        advantages=batch.advantages,
        old_log_prob=batch.sampler_logp,
        clip_range=hybrid.clip_range,
        weight=hybrid.rl_weight,
    )
