"""The model that learns: its forward pass, its optimizer, and one update from a list of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.config import OptimizerConfig
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
from opd.optim.build import NaturalGradient, build_optimizer, learning_rate_factor
from opd.ranks import ALONE, Ranks
from opd.teachers.ema import Ema
from opd.teachers.local import mask_vocabulary
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.details import ViewCollector
from opd.trainer.guardrails import bad_gradient, check_loss, gradient_error
from opd.trainer.hybrid_update import preview
from opd.trainer.metrics import POLICY_MEANS, TokenMetrics
from opd.types import AnyTarget, Batch, DenseTarget, HiddenTarget, LossOutput, Rollout, TeacherMixture

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
        return total, TokenLoss(loss=per_token, metrics=metrics)

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
        return weighted_sum(loss, batch.token_weights), TokenLoss(loss=loss, metrics=metrics)

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


def _policy(batch: Batch, hybrid: Hybrid) -> PolicyTerm | None:
    if hybrid.rl_weight == 0.0:
        return None
    assert batch.advantages is not None
    return PolicyTerm(
        advantages=batch.advantages,
        old_log_prob=batch.sampler_logp,
        clip_range=hybrid.clip_range,
        weight=hybrid.rl_weight,
    )


class Student(Policy):
    """Weights, optimizer and schedule. `version` counts the updates they have had."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: OptimizerConfig,
        *,
        vocabulary: VocabularyMatch,
        eos_ids: Sequence[int],
        teacher_logits: Callable[[HiddenTarget], torch.Tensor],
        total_steps: int,
        autocast: bool = False,
        loss_memory: Memory = "fast",
        gradient_checkpointing: bool = False,
        plain_sampling: bool = False,
        ema: Ema | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """With several `ranks` each updates on its own micro-batches, and all take the same step."""
        super().__init__(
            disable_dropout(model),
            vocabulary=vocabulary,
            eos_ids=eos_ids,
            teacher_logits=teacher_logits,
            autocast=autocast,
            loss_memory=loss_memory,
        )
        self.peak_lr = config.peak_lr
        self.learning_rate_factors = [learning_rate_factor(step, total_steps, config) for step in range(total_steps)]
        self.max_grad_norm = config.gradient_limit
        """0 does not clip."""
        self.plain_sampling = plain_sampling
        self.ema = ema
        self.ranks = ranks
        self.version = 0
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.gradient_checkpointing = gradient_checkpointing
        self.in_float16 = any(p.dtype == torch.float16 for p in model.parameters())
        self.optimizers = build_optimizer(model, config)

    def update(
        self, batches: Sequence[Batch], objective: Objective | Hybrid, watched: Sequence[Rollout] = ()
    ) -> LossOutput:
        """One optimizer step on the micro-batches of all ranks. On a NaN or infinite loss or gradient it raises, and weights and optimizer are as before. The views of
        `watched` rollouts are of the weights before the step."""
        watch = ViewCollector(watched)
        metrics = TokenMetrics(plain_sampling=self.plain_sampling)
        numbers: dict[str, float] = {}
        hybrid, during = as_hybrid(objective), metrics
        if hybrid.needs_preview:
            seen = preview(partial(self.token_loss, watch=watch), batches, hybrid, self.ranks)
            batches, objective, numbers = seen.batches, seen.objective, seen.metrics
            if hybrid.combine == "advantages":  # the update itself sees no teacher
                for batch, out in seen.losses:
                    metrics.add(batch, out)
                during = TokenMetrics()
        self.zero_grad()
        total, seen_batches, up = 0.0, [], None
        with self._training():
            for batch in batches:
                loss = self.loss(batch, objective, during, watch)
                up = up or self._loss_scale(batch)
                (loss * (up or 1.0)).backward()
                total += loss.item()
                seen_batches.append(replace(batch, target=None))
        self._unscale(up or 1.0)
        self.ranks.sum_gradients(self.parameters())
        total = sum(self.ranks.gather(total))
        norm = self.gradient_norm()
        if not norm.isfinite():
            self._explain_gradient(batches, objective)
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.max_grad_norm, norm)
        views, everything = watch.of_all(self.ranks), metrics.of_all(self.ranks)
        means = everything.summary()
        updated = means if during is metrics else during.of_all(self.ranks).summary()
        numbers |= self._step(seen_batches, hybrid.distill.student_temperature)
        policy = {name: value for name, value in updated.items() if name in POLICY_MEANS}
        return LossOutput(
            loss=total,
            metrics={"loss": total, **means, **policy, **numbers, "grad_norm": norm.item()},
            per_token=everything.per_rollout("reverse_kl"),
            views=views,
        )

    def _step(self, batches: Sequence[Batch], temperature: float) -> dict[str, float]:
        factor = self.learning_rate_factors[self.version]
        numbers = {"lr": self.peak_lr * factor}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            if isinstance(optimizer, NaturalGradient):
                numbers |= optimizer.step_on(batches, lambda batch: self._exact_logits(batch) / temperature)
            else:
                optimizer.step()
        self.zero_grad()
        if self.ema is not None:
            self.ema.update()
        self.version += 1
        return numbers

    def _exact_logits(self, batch: Batch) -> torch.Tensor:
        """`logits` without autocast: conjugate gradients need products that agree with each other."""
        return mask_vocabulary(response_logits(self.model, batch.sequences), self.vocabulary)

    def _loss_scale(self, batch: Batch) -> float | None:
        """A power of two that the loss is multiplied by where the model is float16, in which gradients times 1/N would vanish: weights
        per token then are between 1 and 2. None while no token counts."""
        if not self.in_float16:
            return 1.0
        largest = float(batch.token_weights.abs().max()) if len(batch.token_weights) else 0.0
        return 2.0 ** (1 - math.frexp(largest)[1]) if largest > 0.0 else None

    def _unscale(self, up: float) -> None:
        for parameter in self.parameters() if up != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad.div_(up)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def gradient_norm(self) -> torch.Tensor:
        """Global 2-norm of the gradient."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def _explain_gradient(self, batches: Sequence[Batch], objective: Objective | Hybrid) -> NoReturn:
        """The gradient of the whole batch is not finite: find the first sample whose own gradient is not, and raise."""

        def gradient_is_finite(batch: Batch) -> bool:
            self.zero_grad()
            with self._training():
                (self.loss(batch, objective, TokenMetrics()) * (self._loss_scale(batch) or 1.0)).backward()
            return bool(self.gradient_norm().isfinite())

        try:
            sample = bad_gradient(batches, gradient_is_finite)
        finally:
            self.zero_grad()
        raise gradient_error(next((one for one in self.ranks.gather(sample) if one is not None), None))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Gradient checkpointing happens only in layers that are in training mode; nothing else needs that mode, and dropout in its
        many forms must stay off."""
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers if self.gradient_checkpointing else ():
            layer.training = True  # the layer alone: train() would go down to its parts
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout would make the trained policy differ from the sampling one: every rate that a module holds becomes 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    return model
