"""The model that learns: its forward pass, its optimizer, and one update from a list of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.config import OptimizerConfig
from opd.errors import ConfigError
from opd.kernels import (
    Memory,
)
from opd.losses import Hybrid, Objective, as_hybrid
from opd.models import response_hidden, response_logits
from opd.optim.build import NaturalGradient, build_optimizer, learning_rate_factor
from opd.optim.offload import moments_on
from opd.ranks import ALONE, Ranks
from opd.teachers.ema import Ema
from opd.teachers.local import mask_vocabulary
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.details import ViewCollector
from opd.trainer.guardrails import bad_gradient, gradient_error
from opd.trainer.hybrid_update import preview
from opd.trainer.metrics import POLICY_MEANS, TokenMetrics
from opd.trainer.parts import AVERAGES, OPTIMIZER, WEIGHTS, write_parts
from opd.trainer.policy import Policy
from opd.trainer.whole import local
from opd.types import (
    Batch,
    HiddenTarget,
    LossOutput,
    Rollout,
    Sequences,
)

if TYPE_CHECKING:
    from opd.trainer.division import Divisions

CHECKPOINT = "checkpoint"
"""Name of the task that writes what a checkpoint holds of divided weights."""


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
        divisions: Divisions | None = None,
    ) -> None:
        """With several `ranks` each updates on its own micro-batches, and all take the same step; with `divisions` each has a part of the
        weights, of their gradients and of the optimizer's state."""
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
        self.divisions = divisions
        self.division = None if divisions is None else divisions.of(model)
        if divisions is not None and self.division is not None:
            self.division.close()  # the optimizer gets this rank's parts
            divisions.task(CHECKPOINT, self.write_parts)
        self.in_float16 = any(p.dtype == torch.float16 for p in model.parameters())
        self.optimizers = build_optimizer(model, config)
        self.offload = config.offload
        if self.offload and self.device.type == "cpu":
            raise ConfigError(
                "optimizer.offload=true keeps moments in CPU memory between steps, and the student trains on the CPU anyway; drop it."
            )

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
        if self.divisions is not None:
            assert self.division is not None
            self.division.close()
        self.zero_grad()
        accumulate = self._accumulate if self.division is None else self._accumulate_divided
        total, seen_batches = accumulate(batches, objective, during, watch)
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

    def _accumulate(
        self, batches: Sequence[Batch], objective: Objective | Hybrid, metrics: TokenMetrics, watch: ViewCollector
    ) -> tuple[float, list[Batch]]:
        """Put the gradient of all ranks' micro-batches into `.grad`; the loss of this rank's, and these without their targets."""
        total, seen, up = 0.0, [], None
        with self._training():
            for batch in batches:
                loss = self.loss(batch, objective, metrics, watch)
                up = up or self._loss_scale(batch)
                (loss * (up or 1.0)).backward()
                total += loss.item()
                seen.append(replace(batch, target=None))
        self._unscale(up or 1.0)
        self.ranks.sum_gradients(self.parameters())
        return total, seen

    def _accumulate_divided(
        self, batches: Sequence[Batch], objective: Objective | Hybrid, metrics: TokenMetrics, watch: ViewCollector
    ) -> tuple[float, list[Batch]]:
        """The same where each rank has a part of the weights: all of them go through the model as often as the one with most to do."""
        assert self.division is not None and self.divisions is not None
        total, seen = 0.0, []
        with self._training():
            for batch in self.division.turns(batches):
                loss = self._nothing() if batch is None else self.loss(batch, objective, metrics, watch)
                self.division.backward(loss)
                if batch is not None:
                    total += loss.item()
                    seen.append(replace(batch, target=None))
        self.divisions.close()
        return total, seen

    def _nothing(self) -> torch.Tensor:
        """A loss of 0 that goes through all layers: the others' gradients are summed as this rank's come."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        one = Sequences(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, predict_index=ids[0])
        with self.autocast():
            return response_hidden(self.model, one).float().sum() * 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def averages(self) -> dict[str, torch.Tensor]:
        """Their averages, by the same names; none without an EMA."""
        return {} if self.ema is None else self.ema.weights()

    def write_parts(self, folder: str) -> None:
        """Write this rank's parts of weights, averages and moments, as every rank does."""
        assert self.divisions is not None
        self.divisions.close()
        write_parts(Path(folder), self.by_name())

    def by_name(self) -> dict[str, torch.Tensor]:
        """Everything that training changes, by names that a checkpoint of divided weights has."""
        found: dict[str, torch.Tensor] = {f"{WEIGHTS}{name}": p for name, p in self.trained().items()}
        found |= {f"{AVERAGES}{name}": average for name, average in self.averages().items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, moments in optimizer.state_dict()["state"].items():
                found |= {f"{OPTIMIZER}{number}/{place}/{name}": value for name, value in moments.items()}
        return found

    def _step(self, batches: Sequence[Batch], temperature: float) -> dict[str, float]:
        factor = self.learning_rate_factors[self.version]
        numbers = {"lr": self.peak_lr * factor}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            if isinstance(optimizer, NaturalGradient):
                numbers |= optimizer.step_on(batches, lambda batch: self._exact_logits(batch) / temperature, self.ranks)
                continue
            with moments_on(self.device, optimizer) if self.offload else nullcontext():
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
        norm = nn.utils.get_total_norm([local(p.grad) for p in self.parameters() if p.grad is not None])
        if self.divisions is None:
            return norm
        parts = self.ranks.gather(float(norm))
        return torch.tensor(sum(part**2 for part in parts) ** 0.5, device=norm.device)

    def _explain_gradient(self, batches: Sequence[Batch], objective: Objective | Hybrid) -> NoReturn:
        """The gradient of the whole batch is not finite: find the first sample whose own gradient is not, and raise."""

        def gradient_is_finite(batch: Batch) -> bool:
            self.zero_grad()
            with self._training():
                (self.loss(batch, objective, TokenMetrics()) * (self._loss_scale(batch) or 1.0)).backward()
            return bool(self.gradient_norm().isfinite())

        if self.divisions is not None:  # one rank cannot go through the model alone
            self.zero_grad()
            raise gradient_error(None)
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
