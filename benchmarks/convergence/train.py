"""One training run: rollouts, opd's loss, opd's optimizer, and the exact accuracy on held-out prompts as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.convergence.methods import Method
from benchmarks.convergence.model import TinyDecoder
from benchmarks.convergence.task import Prompts, accuracy, draw_prompts, generator, rewards
from opd.config import OptimizerConfig
from opd.kernels import PolicyTerm, objective_from_logits
from opd.losses import (
    Hybrid,
    TokenLoss,
    group_relative_advantage,
    leave_one_out_advantage,
    route,
    token_weights,
    weighted_sum,
)
from opd.optim.build import build_optimizer, learning_rate_factor
from opd.optim.natural_gradient import natural_gradient_step
from opd.trainer.hybrid_update import preview
from opd.types import Batch, DenseTarget, Sequences

NATURAL, DAMPED = "natural_gradient", "natural_gradient_damped"
NATURALS = {NATURAL: 0.03, DAMPED: 0.3}
"""Damping: what suited distillation's clean gradient, and what suited GRPO's noisy one (benchmarks/LOG.md)."""
ITERATIONS, PROBES = 10, 4  # of the solver, for both
EVALUATE_EVERY = 16  # a step number s is evaluated when s is a multiple of max(1, s // 16): to 6 % of the step


MAX_NORM = 1.0  # the default of opd's AdamW and Muon
COLLAPSE = 0.05  # of the base's accuracy: a reward that is never seen again teaches nothing, and the run ends


@dataclass
class Curve:
    """Accuracy after so many updates."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def reached(self, level: float) -> int | None:
        """The first whole step at which the accuracy is at the level, on the line between evaluations."""
        for i, value in enumerate(self.values):
            if value >= level:
                if i == 0:
                    return self.steps[0]
                low, high = self.values[i - 1], value
                part = (level - low) / (high - low)
                return math.ceil(self.steps[i - 1] + part * (self.steps[i] - self.steps[i - 1]) - 1e-9)
        return None


@dataclass
class Run:
    """Result of a training run."""

    curve: Curve
    seconds_per_step: float
    """CPU time of sampling, scoring and updating; evaluation is not counted."""
    model: TinyDecoder


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, fully said. `teachers` has one model per domain, or one for all."""

    method: Method
    optimizer: str
    lr: float
    """Of natural_gradient: the trust region, nats per token."""
    rollouts: int
    digits: int
    domains: tuple[int, ...]
    seed: int
    max_steps: int
    schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up; linear ends at 0."""
    stop_at: float = math.inf
    """Accuracy that ends the run."""
    draw: int = 0
    """Another number draws other samples for the same prompts."""


def train(job: Job, student: TinyDecoder, teachers: Sequence[TinyDecoder], held: Prompts) -> Run:
    """Trains `student` in place."""
    update = updater(student, job)
    curve = Curve()
    curve.add(0, accuracy(student, held)[0])
    spent = 0.0
    step = 0
    for step in range(1, job.max_steps + 1):
        started = time.process_time()
        batch, logits = collect(job, student, teachers, step)
        update(batch, logits)
        spent += time.process_time() - started
        if step % max(1, step // EVALUATE_EVERY) == 0 or step == job.max_steps:
            curve.add(step, accuracy(student, held)[0])
            hopeless = job.method.objective is None and curve.values[-1] < COLLAPSE * curve.values[0]
            if hopeless or curve.values[-1] >= job.stop_at or not math.isfinite(curve.values[-1]):
                break
    return Run(curve, spent / max(1, step), student)


def step_prompts(job: Job, step: int) -> tuple[Prompts, torch.Generator]:
    """Prompts of a step, and the generator that the step's samples are drawn from next."""
    source = generator(job.seed, step, "rollouts")
    prompts = draw_prompts(job.rollouts // job.method.samples, job.digits, job.domains, source)
    return prompts, generator(job.seed, step, f"rollouts {job.draw}") if job.draw else source


def collect(
    job: Job, student: TinyDecoder, teachers: Sequence[TinyDecoder], step: int
) -> tuple[Batch, Callable[[], Tensor]]:
    """The rollouts of a step with everything the loss needs, and the student's logits on them."""
    method = job.method
    prompts, source = step_prompts(job, step)
    everyone = torch.arange(len(prompts)).repeat_interleave(method.samples)
    if method.source == "student":
        responses = student.sample(prompts.ids, method.samples, job.digits, source)
    else:
        responses = _written(teachers, prompts, method.samples, job.digits, source)
    rows = prompts.ids[everyone]
    batch = Batch(
        sequences=_sequences(rows, responses),
        response_ids=responses.flatten(),
        sequence_index=torch.arange(len(rows)).repeat_interleave(job.digits),
        rollouts=(),
        target=_target(method, teachers, rows, responses, prompts.domain[everyone]),
        token_weights=token_weights(
            torch.zeros(responses.numel(), dtype=torch.long), torch.tensor([job.digits]), global_count=responses.numel()
        ),
        advantages=_advantages(method, prompts, responses),
    )
    return batch, lambda: student.response_logits(rows, responses)


def _sequences(prompts: Tensor, responses: Tensor) -> Sequences:
    ids = torch.cat([prompts, responses], dim=1)
    rows, length = ids.shape
    first = prompts.shape[1] - 1
    place = torch.arange(rows).unsqueeze(-1) * length + torch.arange(first, length - 1)
    return Sequences(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(length).expand(rows, -1),
        predict_index=place.flatten(),
    )


@torch.no_grad()
def _target(
    method: Method, teachers: Sequence[TinyDecoder], rows: Tensor, responses: Tensor, domain: Tensor
) -> DenseTarget | None:
    if method.objective is None:
        return None
    if len(teachers) == 1:
        return DenseTarget(logits=teachers[0].response_logits(rows, responses))
    chosen = domain.repeat_interleave(responses.shape[1])
    each = torch.zeros(len(teachers), chosen.numel(), teachers[0].shape.vocab)
    for number, teacher in enumerate(teachers):  # each teacher reads its own rows
        own = domain == number
        each[number, chosen == number] = teacher.response_logits(rows[own], responses[own])
    return DenseTarget(logits=route(list(each), chosen))


def _written(
    teachers: Sequence[TinyDecoder], prompts: Prompts, samples: int, digits: int, source: torch.Generator
) -> Tensor:
    if len(teachers) == 1:
        return teachers[0].sample(prompts.ids, samples, digits, source)
    responses = torch.zeros(len(prompts) * samples, digits, dtype=torch.long)
    domain = prompts.domain.repeat_interleave(samples)
    for number, teacher in enumerate(teachers):
        responses[domain == number] = teacher.sample(prompts.ids[prompts.domain == number], samples, digits, source)
    return responses


def _advantages(method: Method, prompts: Prompts, responses: Tensor) -> Tensor | None:
    if method.imitates:
        return torch.ones(responses.numel())
    if method.rl is None:
        return None
    reward = rewards(prompts, method.samples, responses)
    group = torch.arange(len(reward)) // method.samples
    if method.rl.advantage == "rloo":
        per_sequence = leave_one_out_advantage(reward, group)
    else:
        per_sequence = group_relative_advantage(reward, group, method.rl.normalize_std)
    return per_sequence.float().repeat_interleave(responses.shape[1])


def loss_of(batch: Batch, logits: Tensor, hybrid: Hybrid) -> tuple[Tensor, TokenLoss]:
    """The trainer's own loss, from whole logits."""
    policy = None
    if hybrid.rl_weight != 0.0:
        assert batch.advantages is not None
        policy = PolicyTerm(advantages=batch.advantages, clip_range=hybrid.clip_range, weight=hybrid.rl_weight)
    target = batch.target if hybrid.distill_weight != 0.0 else None
    loss, metrics = objective_from_logits(
        logits,
        target,
        batch.response_ids,
        hybrid.distill,
        policy=policy,
        distill_weight=hybrid.distill_weight,
        sampler_logp=batch.sampler_logp,
        sequence_index=batch.sequence_index,
    )
    return weighted_sum(loss, batch.token_weights), TokenLoss(loss=loss, metrics=metrics)


def total_loss(batch: Batch, logits: Tensor, hybrid: Hybrid) -> Tensor:
    """The loss of a batch, with the trainer's rule for matching the scales of two terms."""
    if hybrid.needs_preview:
        seen = preview(lambda part, term: loss_of(part, logits.detach(), term), [batch], hybrid)
        batch, hybrid = seen.batches[0], seen.objective
    return loss_of(batch, logits, hybrid)[0]


def updater(student: TinyDecoder, job: Job) -> Callable[[Batch, Callable[[], Tensor]], None]:
    """The optimizer step: from a batch and the student's logits on it to new weights."""
    return (_natural if job.optimizer in NATURALS else _first_order)(student, job)


def _first_order(student: TinyDecoder, job: Job) -> Callable[[Batch, Callable[[], Tensor]], None]:
    """opd's AdamW or Muon: warm-up, gradients clipped to norm 1, then a constant rate."""
    config = OptimizerConfig(name=job.optimizer, lr=job.lr, warmup_steps=job.method.warmup, schedule=job.schedule)  # pyright: ignore[reportArgumentType]
    optimizers = build_optimizer(cast(PreTrainedModel, student), config)
    parameters = list(student.parameters())
    hybrid = job.method.hybrid
    done = 0

    def update(batch: Batch, logits: Callable[[], Tensor]) -> None:
        nonlocal done
        total_loss(batch, logits(), hybrid).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        factor = learning_rate_factor(done, job.max_steps, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        student.zero_grad(set_to_none=True)
        done += 1

    return update


def _natural(student: TinyDecoder, job: Job) -> Callable[[Batch, Callable[[], Tensor]], None]:
    """opd's natural gradient on the whole batch, the trust region being the rate."""
    parameters = list(student.parameters())
    hybrid = job.method.hybrid
    done = 0

    def update(batch: Batch, logits: Callable[[], Tensor]) -> None:
        nonlocal done
        gradient = torch.autograd.grad(total_loss(batch, logits(), hybrid), parameters)
        factor = 1.0 if job.schedule == "constant" else 1.0 - done / job.max_steps
        natural_gradient_step(
            parameters,
            gradient,
            [batch],
            lambda _: logits(),
            [batch.token_weights],
            trust_region=job.lr,
            damping=NATURALS[job.optimizer],
            iterations=ITERATIONS,
            probes=PROBES,
        ).apply(parameters, factor)
        done += 1

    return update
