"""Several teachers at once: mix their distributions, choose one per token, or add their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int
from opd.losses.weights import WEIGHT_SUM_TOLERANCE

Mixture = Literal["probability", "logit"]


def mix_teachers(
    teacher_logps: Sequence[Float[Tensor, "tokens vocab"]],
    weights: Float[Tensor, "tokens teachers"] | Float[Tensor, " teachers"],
    mixture: Mixture = "probability",
) -> Float[Tensor, "tokens vocab"]:
    """One teacher out of several: log Σ w_i q_i (probability), or Σ w_i log q_i renormalised (logit)."""
    per_teacher = _checked_weights(teacher_logps, weights)
    if mixture == "probability":
        mixed = torch.stack([logq + w.log().unsqueeze(-1) for logq, w in zip(teacher_logps, per_teacher, strict=True)])
        return torch.logsumexp(mixed, dim=0)
    if mixture != "logit":
        raise ObjectiveError(f"mixture={mixture!r} is not one of probability, logit; to add losses, use mix_losses.")
    blended = torch.zeros_like(teacher_logps[0])
    for logq, w in zip(teacher_logps, per_teacher, strict=True):
        blended = blended + _times(w.unsqueeze(-1), logq)
    if blended.numel() and bool((blended == -torch.inf).all(dim=-1).any()):
        raise ObjectiveError(
            "mixture='logit' has no tokens left at some position: every token is impossible for one of the teachers; "
            "use mixture='probability'."
        )
    return torch.log_softmax(blended, dim=-1)


def route(
    teacher_logps: Sequence[Float[Tensor, "tokens vocab"]], teacher_index: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocab"]:
    """Row t from the teacher numbered `teacher_index[t]`."""
    if not teacher_logps:
        raise ObjectiveError("route needs at least one teacher.")
    if teacher_index.numel() and not 0 <= int(teacher_index.min()) <= int(teacher_index.max()) < len(teacher_logps):
        raise ObjectiveError(f"teacher_index names a teacher outside 0..{len(teacher_logps) - 1}.")
    chosen = teacher_logps[0]
    for number, logq in enumerate(teacher_logps):
        chosen = torch.where((teacher_index == number).unsqueeze(-1), logq, chosen)
    return chosen


def mix_losses(
    losses: Sequence[Float[Tensor, " tokens"]],
    weights: Float[Tensor, "tokens teachers"] | Float[Tensor, " teachers"],
) -> Float[Tensor, " tokens"]:
    """Σ w_i D(S, T_i), per token."""
    total = torch.zeros_like(losses[0]) if losses else torch.zeros(0)
    for loss, w in zip(losses, _checked_weights(losses, weights), strict=True):
        total = total + _times(w, loss)
    return total


def _checked_weights(per_teacher: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """One weight tensor per teacher, each [tokens] or a scalar expanded to it."""
    if not per_teacher or weights.shape[-1] != len(per_teacher):
        raise ObjectiveError(
            f"{len(per_teacher)} teachers, but weights for {weights.shape[-1]}; give one weight per teacher."
        )
    weights = weights.to(per_teacher[0].dtype)
    sums_to_1 = (weights.sum(dim=-1) - 1.0).abs() <= WEIGHT_SUM_TOLERANCE
    if not (bool((weights >= 0).all()) and bool(sums_to_1.all())):
        raise ObjectiveError("teacher weights must be ≥ 0 and sum to 1 at every token; divide them by their sum.")
    return weights.expand(per_teacher[0].shape[0], len(per_teacher)).unbind(dim=-1)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, and 0 where the weight is 0 whatever the value."""
    return weight * torch.where(weight == 0, 0.0, value)
