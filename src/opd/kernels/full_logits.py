"""The loss from whole logits, by `losses` and autograd: the definition, for every caller that holds both models' logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd.kernels.few_tokens import policy_loss, policy_loss_by_autograd
from opd.kernels.spec import (
    Columns,
    Diagnostics,
    PolicyTerm,
    RowResults,
    RowSpec,
    Teachers,
    at,
    log_probs,
    pieces,
    restore_neg_inf,
)
from opd.losses import Objective, entropy, mix_losses, mix_teachers, student_diagnostics, to_logp, token_diagnostics
from opd.losses._shapes import Float, Int
from opd.losses.groups import merge_tokens
from opd.types import AnyTarget, DenseTarget, SampledTarget, Target, TeacherMixture, TopKTarget


def objective_from_logits(
    student_logits: Float[Tensor, "tokens vocab"],
    target: AnyTarget | None,
    response_ids: Int[Tensor, " tokens"],
    objective: Objective,
    *,
    policy: PolicyTerm | None = None,
    distill_weight: float = 1.0,
    sampler_logp: Float[Tensor, " tokens"] | None = None,
    sequence_index: Int[Tensor, " tokens"] | None = None,
    eos_ids: Sequence[int] = (),
) -> tuple[Float[Tensor, " tokens"], dict[str, Float[Tensor, " tokens"]]]:
    """The loss of every token, differentiable, and the metrics: the numbers of `linear_objective`, from logits.

    Masked tokens have logits of −inf on both sides, and `target` holds no hidden states. Raises ObjectiveError for shapes and
    targets that do not fit the objective.
    """
    vocab = student_logits.shape[-1]
    seen = Diagnostics(target=target, eos_ids=tuple(i for i in eos_ids if i < vocab))
    rows = RowSpec(
        columns=Columns.whole(vocab),
        objective=objective,
        target=target,
        response_ids=response_ids,
        sampler_logp=sampler_logp,
        sequence_index=sequence_index,
        policy=policy,
        distill_weight=distill_weight,
        diagnostics=seen,
    )
    loss, values = loss_from_logits(rows, student_logits, target)
    metrics = diagnostics_from_logits(rows, student_logits, target)
    return loss, metrics | {n: v for n, v in values.items() if n in ("clamped", "policy_loss", "clipped")}


def loss_from_logits(
    rows: RowSpec, logits: Float[Tensor, "tokens vocab"], target: AnyTarget | None
) -> tuple[Float[Tensor, " tokens"], dict[str, Tensor]]:
    """The differentiable loss of every row, and its parts without gradient; entropies only where no diagnostics tell them.

    Neither side's logits are divided by a temperature yet; `target`, without hidden states, stands for that of `rows`.
    """
    rows, logits, target = _merged(rows, logits, target)
    loss, values = torch.zeros_like(logits[:, 0], dtype=torch.promote_types(logits.dtype, torch.float32)), {}
    own, temperature = rows.diagnostics is None, rows.objective.student_temperature
    logp = to_logp(logits, temperature) if own or rows.has_extras else None
    if target is not None:
        divergence, values = _divergence(rows, logits, target)
        loss = loss + rows.distill_weight * divergence
    student_entropy = None
    if logp is not None and (own or rows.entropy_bonus):
        student_entropy = entropy(logp if rows.entropy_bonus else logp.detach())
        values["student_entropy"] = student_entropy.detach()
    if logp is not None and rows.response_ids is not None:
        y_logp = logp.gather(-1, rows.response_ids.unsqueeze(-1)).squeeze(-1)
        values["student_logp"] = y_logp.detach()
        if rows.policy is not None:
            surrogate = policy_loss_by_autograd(rows.policy, y_logp)
            values["policy_loss"], values["clipped"] = surrogate.detach(), policy_loss(rows.policy, y_logp)[2]
            loss = loss + surrogate
    if student_entropy is not None and rows.entropy_bonus:
        loss = loss - rows.entropy_bonus * student_entropy
    return loss, values


def _merged(rows: RowSpec, logits: Tensor, target: AnyTarget | None) -> tuple[RowSpec, Tensor, AnyTarget | None]:
    """With `eos_groups`, everything as if a group were one token."""
    groups = rows.objective.eos_groups
    if not groups:
        return rows, logits, target
    if isinstance(target, TeacherMixture) and target.mixture == "loss":
        target = replace(target, targets=tuple(_dense_merged(member, groups) for member in target.targets))
    elif target is not None:
        target = _dense_merged(mixed_target(target, rows.objective.teacher_temperature), groups)
    return rows.with_first_ids(), merge_tokens(logits, groups), target


def _dense_merged(target: Any, groups: Sequence[Sequence[int]]) -> Any:
    return DenseTarget(logits=merge_tokens(target.logits, groups)) if isinstance(target, DenseTarget) else target


def _divergence(rows: RowSpec, logits: Tensor, target: AnyTarget) -> tuple[Tensor, dict[str, Tensor]]:
    objective, ids = rows.objective, rows.response_ids
    given = ids if ids is not None else torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def against(one: Target) -> tuple[Tensor, Tensor]:
        sampler, index = rows.sampler_logp, rows.sequence_index
        return objective.per_token_loss(logits, one, given, sampler_logp=sampler, sequence_index=index)

    if isinstance(target, TeacherMixture) and target.mixture == "loss":
        losses, clamped = zip(*(against(member) for member in target.targets), strict=True)
        divergence = mix_losses(losses, target.weights)
        return divergence, {"divergence": divergence.detach(), "clamped": torch.stack(clamped).sum(0)}
    one = mixed_target(target, objective.teacher_temperature)
    divergence, clamped = against(one)
    values = {"divergence": divergence.detach(), "clamped": clamped.detach()}
    if isinstance(one, DenseTarget) and rows.diagnostics is None:
        values["teacher_entropy"] = entropy(to_logp(one.logits, objective.teacher_temperature))
    return divergence, values


def mixed_target(target: AnyTarget, temperature: float) -> Target:
    """One distribution in place of several; it will be divided by the temperature again."""
    if not isinstance(target, TeacherMixture):
        return target
    members = [to_logp(member.logits, temperature) for member in target.targets if isinstance(member, DenseTarget)]
    return DenseTarget(logits=mix_teachers(members, target.weights, target.mixture) * temperature)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def diagnostics_from_logits(rows: RowSpec, logits: Tensor, target: AnyTarget | None) -> dict[str, Tensor]:
    """The metrics of every row at temperature 1; where losses are added, Σ w of each teacher's."""
    rows, logits, target = _merged(rows, logits, target)
    logp = to_logp(logits.detach())
    if isinstance(target, TeacherMixture) and target.mixture == "loss":
        each = [_diagnostics(rows, logp, member) for member in target.targets]
        found = {name: mix_losses([one[name].to(logp.dtype) for one in each], target.weights) for name in each[0]}
        return found | {"eos_prob": each[0]["eos_prob"]}
    one = None if target is None else mixed_target(target, rows.objective.teacher_temperature)
    return _diagnostics(rows, logp, one)


def _diagnostics(rows: RowSpec, student_logp: Tensor, target: AnyTarget | None) -> dict[str, Tensor]:
    seen, ids = rows.diagnostics, rows.response_ids
    assert seen is not None and ids is not None
    if isinstance(target, (DenseTarget, TopKTarget, SampledTarget)):
        found = token_diagnostics(student_logp, target, ids, rows.objective.top_k)
    else:
        found = student_diagnostics(student_logp, ids)
    eos = torch.tensor(seen.eos_ids, device=student_logp.device, dtype=torch.long)
    return {**found, "eos_prob": student_logp[:, eos].exp().sum(-1)}


# ---- a few rows at a time, from logits that are divided by their temperatures ------------------------------------------


def loss_by_autograd(rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults:
    """`loss_from_logits` of the rows of a chunk, a few at a time; the gradient replaces z. Masked logits are −inf."""
    plain = replace(rows.objective, student_temperature=1.0, teacher_temperature=1.0, scale_by_t2=False)
    shards, parts = rows.columns.shards, []
    for piece in pieces(z):
        some = replace(rows.at(piece), objective=plain)
        logits = shards.gather_columns(z[piece]).detach().requires_grad_(gradient)
        with torch.enable_grad():
            loss, values = loss_from_logits(some, logits, _target(some, teachers, piece))
            if gradient:
                (slope,) = torch.autograd.grad(loss.sum(), logits)
                z[piece].copy_(shards.own_columns(slope))
        values = {name: value.to(z.dtype) for name, value in {**values, "loss": loss.detach()}.items()}
        parts.append(RowResults(values=values, scale=torch.ones_like(values["loss"])))
    return RowResults.join(parts, z)


def _target(rows: RowSpec, teachers: Teachers, piece: slice) -> AnyTarget | None:
    if not teachers:
        return rows.target
    members = tuple(DenseTarget(logits=rows.columns.shards.gather_columns(t[piece])) for _, t in teachers)
    weights = [weight[piece] for weight, _ in teachers if weight is not None]
    if not weights:
        return members[0]
    return TeacherMixture(targets=members, weights=torch.stack(weights, -1), mixture="loss")


@torch.no_grad()
def diagnostics_of_rows(rows: RowSpec, z: Tensor, teachers: Teachers) -> dict[str, Tensor]:
    """`diagnostics_from_logits` of the rows of a chunk, a few at a time, under names that begin with "diagnostics/"."""
    parts = [
        _diagnostics_of(rows.at(piece), z[piece], [(at(w, piece), t[piece]) for w, t in teachers])
        for piece in pieces(z)
    ]
    return {f"diagnostics/{name}": torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _diagnostics_of(rows: RowSpec, z: Tensor, teachers: Teachers) -> dict[str, Tensor]:
    objective, gather, seen = rows.objective, rows.columns.shards.gather_columns, rows.diagnostics
    at_one = _times(gather(z), objective.student_temperature)
    if not teachers:
        assert seen is not None
        found = _diagnostics(rows, log_probs(at_one), seen.target)
        return {name: restore_neg_inf(value) for name, value in found.items()}
    logp, total = to_logp(at_one), {}
    for weight, t in teachers:
        target = DenseTarget(logits=_times(gather(t), objective.teacher_temperature))
        for name, value in _diagnostics(rows, logp, target).items():
            value = restore_neg_inf(value)
            share = value if weight is None else torch.where(weight > 0, weight * value, 0.0)
            total[name] = total[name] + share if name in total else share
    return total


def _times(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits * temperature
