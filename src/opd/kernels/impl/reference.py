"""The definition: whole logits, `losses`, autograd. Every other implementation is held to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.kernels.request import Answer, Request, TeacherMixture
from opd.kernels.terms import policy_loss, policy_loss_by_autograd
from opd.losses import entropy, mix_losses, mix_teachers, student_diagnostics, to_logp, token_diagnostics, weighted_sum
from opd.types import DenseTarget, HiddenTarget, Target


def run(request: Request) -> Answer:
    """The request's loss and gradients."""
    leaves = [
        None if value is None else value.detach().to(request.dtype).requires_grad_(wanted)
        for value, wanted in (
            (request.hidden, request.needs.hidden),
            (request.weight, request.needs.weight),
            (request.bias, request.needs.bias),
        )
    ]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    rows: dict[str, Tensor] = {}
    with torch.enable_grad():
        logits = _masked(_linear(request, hidden, weight, bias), request)
        loss = _token_loss(request, logits, rows)
        total = weighted_sum(loss, request.token_weights)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = list(torch.autograd.grad(total, wanted)) if wanted else []
    rows["loss"] = loss.detach()
    gradients = [found.pop(0) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
    rows = {name: value.to(request.dtype) for name, value in rows.items()}
    return Answer(rows=rows, hidden_grad=gradients[0], weight_grad=gradients[1], bias_grad=gradients[2])


def _linear(request: Request, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = request.dtype
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _masked(logits: Tensor, request: Request) -> Tensor:
    logits = logits[:, : request.vocab]
    if request.masked_ids:
        logits = logits.index_fill(-1, torch.tensor(request.masked_ids, device=logits.device), -torch.inf)
    return logits


def _token_loss(request: Request, logits: Tensor, rows: dict[str, Tensor]) -> Tensor:
    objective, ids = request.objective, request.response_ids
    logp = to_logp(logits, objective.student_temperature)
    loss = torch.zeros_like(logp[:, 0])
    if request.target is not None:
        divergence = _divergence(request, logits, rows)
        rows["divergence"] = divergence.detach()
        loss = loss + request.distill_weight * divergence
    elif request.watch is not None and ids is not None:
        rows |= _seen(request, student_diagnostics(to_logp(logits.detach()), ids), logits)
    student_entropy = entropy(logp)
    rows["student_entropy"] = student_entropy.detach()
    if ids is not None:
        y_logp = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        rows["student_logp"] = y_logp.detach()
        if request.policy is not None:
            surrogate = policy_loss_by_autograd(request.policy, y_logp)
            rows["policy_loss"], rows["clipped"] = surrogate.detach(), policy_loss(request.policy, y_logp)[2]
            loss = loss + surrogate
    return loss - request.entropy_bonus * student_entropy if request.entropy_bonus else loss


def _divergence(request: Request, logits: Tensor, rows: dict[str, Tensor]) -> Tensor:
    objective = replace(request.objective, scale_by_t2=False)
    ids = request.response_ids
    if ids is None:
        ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def one(target: Target) -> Tensor:
        loss, clamped = objective.per_token_loss(logits, target, ids, sampler_logp=request.sampler_logp)
        rows["clamped"] = rows.get("clamped", 0.0) + clamped.detach()
        return loss

    if isinstance(request.target, TeacherMixture):
        return _of_mixture(request, request.target, logits, one, rows)
    target = _plain(request, request.target)
    if isinstance(target, DenseTarget):
        rows["teacher_entropy"] = entropy(to_logp(target.logits, objective.teacher_temperature))
    if request.watch is not None and request.response_ids is not None:
        logp = to_logp(logits.detach())
        seen = token_diagnostics(logp, _plain(request, request.watch.target), ids, objective.top_k)
        rows |= _seen(request, seen, logits)
    return one(target)


def _seen(request: Request, found: Mapping[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    """Diagnostics under the names that a trainer looks for, with the probability of an end."""
    assert request.watch is not None
    eos = [i for i in request.watch.eos_ids if i < request.vocab]
    ends = to_logp(logits.detach())[:, eos].exp().sum(-1)
    return {"watch/eos_prob": ends, **{f"watch/{name}": value for name, value in found.items()}}


def _of_mixture(
    request: Request,
    mixture: TeacherMixture,
    logits: Tensor,
    one: Callable[[Target], Tensor],
    rows: dict[str, Tensor],
) -> Tensor:
    members = [_plain(request, member) for member in mixture.targets]
    watched = request.watch is not None and request.response_ids is not None
    if mixture.mixture == "loss":
        if watched:
            rows |= _seen(request, _weighted_diagnostics(request, members, mixture.weights, logits), logits)
        return mix_losses([one(member) for member in members], mixture.weights)
    temperature = request.objective.teacher_temperature
    logps = [to_logp(member.logits, temperature) for member in members]
    mixed = mix_teachers(logps, mixture.weights, mixture.mixture)
    rows["teacher_entropy"] = entropy(to_logp(mixed))
    if watched and request.response_ids is not None:
        at_one = DenseTarget(logits=mixed * temperature)
        k = request.objective.top_k
        rows |= _seen(request, token_diagnostics(to_logp(logits.detach()), at_one, request.response_ids, k), logits)
    return one(DenseTarget(logits=mixed * temperature))  # which is divided by the temperature again


def _weighted_diagnostics(
    request: Request, members: Sequence[DenseTarget], weights: Tensor, logits: Tensor
) -> dict[str, Tensor]:
    """Σ w of each teacher's, where losses are added."""
    assert request.response_ids is not None
    logp, k = to_logp(logits.detach()), request.objective.top_k
    seen = [token_diagnostics(logp, member, request.response_ids, k) for member in members]
    return {name: mix_losses([one[name].to(request.dtype) for one in seen], weights) for name in seen[0]}


def _plain(request: Request, target: Any) -> Any:
    """Logits over the common vocabulary in place of hidden states."""
    if isinstance(target, HiddenTarget):
        target = DenseTarget(logits=_linear(request, target.hidden, target.head.weight, target.head.bias))
    return DenseTarget(logits=_masked(target.logits, request)) if isinstance(target, DenseTarget) else target
