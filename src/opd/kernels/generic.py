"""Any objective on a few whole rows at a time, through `losses` and autograd: exact by definition, bounded by the piece.

Used for losses without a closed-form row pass, and for single rows that the fast passes cannot hold: a divergence that is
truly infinite, a logit of −inf, a range beyond float32's exponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.kernels.normal import log_probs
from opd.kernels.request import Request, select_policy, select_target, true_infinity
from opd.kernels.rows import Rows
from opd.kernels.terms import policy_loss, policy_loss_by_autograd
from opd.losses import entropy, student_diagnostics, to_logp, token_diagnostics
from opd.types import DenseTarget, SampledTarget, Target, TopKTarget

CPU_PIECE = 1 << 16  # vocabulary entries of float32 that fit a core's cache
GPU_PIECE = 1 << 24  # 64 MiB of float32; autograd keeps about thirty copies of a piece


class ByAutograd:
    """The row pass of losses without one of their own."""

    fill = -torch.inf
    watches = False

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(
        self, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, *, gradient: bool
    ) -> Rows:
        return by_autograd(self.request, z, teachers, index, gradient=gradient)


def piece_rows(logits: Tensor) -> int:
    """Rows that are worked on together."""
    entries = GPU_PIECE if logits.is_cuda else CPU_PIECE
    return max(1, entries // max(1, logits.shape[-1]))


def by_autograd(
    request: Request, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, *, gradient: bool
) -> Rows:
    """Loss of the rows `index` of the request, whose logits are `z`; the gradient replaces z.

    Masked logits are −inf. `teachers` are (weight per token or None, logits) and empty for a target without logits.
    """
    parts = []
    for first in range(0, z.shape[0], piece_rows(z)):
        piece = slice(first, first + piece_rows(z))
        own = [(None if w is None else w[piece], t[piece]) for w, t in teachers]
        parts.append(_piece(request, z[piece], own, index[piece], gradient))
    return Rows.join(parts, z)


def _piece(
    request: Request, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, gradient: bool
) -> Rows:
    shards = request.shards
    logits = shards.gather_columns(z).detach().requires_grad_(gradient)
    ids = None if request.response_ids is None else request.response_ids[index]
    sampler = None if request.sampler_logp is None else request.sampler_logp[index]
    known: dict[str, Tensor] = {}
    with torch.enable_grad():
        logp = to_logp(logits)
        total = torch.zeros_like(logp[:, 0])
        if request.target is not None:
            objective = replace(request.objective, student_temperature=1.0, teacher_temperature=1.0, scale_by_t2=False)
            given = ids if ids is not None else index.new_zeros(index.shape)
            divergence = torch.zeros_like(total)
            for weight, target in _targets(request, teachers, index):
                loss, clamped = objective.per_token_loss(logits, target, given, sampler_logp=sampler)
                divergence = divergence + (loss if weight is None else torch.where(weight > 0, weight * loss, 0.0))
                known["clamped"] = known.get("clamped", 0.0) + clamped.detach()
            total = total + request.distill_weight * divergence
            known["divergence"] = divergence.detach()
        student_entropy = entropy(logp)
        if ids is not None:
            y_logp = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            known["student_logp"] = y_logp.detach()
            policy = select_policy(request.policy, index)
            if policy is not None:
                loss = policy_loss_by_autograd(policy, y_logp)
                total = total + loss
                known["policy_loss"], _, known["clipped"] = policy_loss(policy, y_logp)
        if request.entropy_bonus:
            total = total - request.entropy_bonus * student_entropy
        if gradient:
            (slope,) = torch.autograd.grad(total.sum(), logits)
            z.copy_(shards.own_columns(slope))
    known["student_entropy"] = student_entropy.detach()
    if teachers and teachers[0][0] is None:
        known["teacher_entropy"] = entropy(to_logp(shards.gather_columns(teachers[0][1])))
    values = {name: value.to(z.dtype) for name, value in {**known, "loss": total.detach()}.items()}
    return Rows(values=values, scale=torch.ones_like(values["loss"]))


def _targets(
    request: Request, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor
) -> list[tuple[Tensor | None, Target]]:
    if teachers:
        return [(w, DenseTarget(logits=request.shards.gather_columns(t))) for w, t in teachers]
    return [(None, select_target(request.target, index))]  # pyright: ignore[reportReturnType]


def watch_all(
    request: Request, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor
) -> dict[str, Tensor]:
    """A trainer's diagnostics of the rows `index`: of the one teacher or mixture; where losses are added, Σ w of each teacher's."""
    if not teachers or teachers[0][0] is None:
        return watch(request, z, teachers[0][1] if teachers else None, index)
    total: dict[str, Tensor] = {}
    for weight, t in teachers:
        for name, value in watch(request, z, t, index).items():
            share = torch.where(weight > 0, weight * value, 0.0)  # pyright: ignore[reportOptionalOperand]
            total[name] = share if name not in total else total[name] + share
    return total


@torch.no_grad()
def watch(request: Request, z: Tensor, t: Tensor | None, index: Tensor) -> dict[str, Tensor]:
    """A trainer's diagnostics of the rows `index`, always at temperature 1."""
    assert request.watch is not None and request.response_ids is not None
    parts: list[dict[str, Tensor]] = []
    objective, shards = request.objective, request.shards
    eos = torch.tensor([i for i in request.watch.eos_ids if i < request.vocab], device=z.device, dtype=torch.long)
    for first in range(0, z.shape[0], piece_rows(z)):
        piece = slice(first, first + piece_rows(z))
        ids = request.response_ids[index[piece]]
        at_one = _at_one(shards.gather_columns(z[piece]), objective.student_temperature)
        logp = to_logp(at_one) if t is not None else log_probs(at_one)
        if t is None:
            target = select_target(request.watch.target, index[piece])
        else:
            target = DenseTarget(logits=_at_one(shards.gather_columns(t[piece]), objective.teacher_temperature))
        if isinstance(target, (DenseTarget, TopKTarget, SampledTarget)):
            found = token_diagnostics(logp, target, ids, objective.top_k)
        else:
            found = student_diagnostics(logp, ids)
        found["eos_prob"] = logp[:, eos].exp().sum(-1)
        parts.append({f"watch/{name}": true_infinity(value) for name, value in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _at_one(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits * temperature
