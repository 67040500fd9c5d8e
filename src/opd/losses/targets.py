"""Logits and log-probs of a target, as tensors over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int
from opd.losses.partial import gather_logp
from opd.types import DenseTarget, HiddenTarget, SampledTarget, Target, TopKTarget

NO_SAMPLED_LOGP = (
    "this loss needs the teacher's log-prob of the sampled token, but the TopKTarget has none; let the teacher fill in "
    "sampled_logp, or use tail='bucket' without include_sampled."
)


def dense_from_hidden(target: HiddenTarget) -> DenseTarget:
    """Teacher logits hidden @ weight.T + bias, in float32 (float64 stays), with padding rows of the head at −inf."""
    head = target.head
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = torch.nn.functional.linear(target.hidden.to(dtype), head.weight.to(dtype), bias)
    if head.valid_vocab is not None:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= head.valid_vocab
        logits = logits.masked_fill(padding, -torch.inf)
    return DenseTarget(logits=logits)


def teacher_logp_of(
    response_ids: Int[Tensor, " tokens"], target: Target, teacher_logp: Float[Tensor, "tokens vocab"] | None
) -> Float[Tensor, " tokens"]:
    """The teacher's log-prob of each response token, wherever this target keeps it."""
    if isinstance(target, SampledTarget):
        return target.teacher_logp
    if isinstance(target, TopKTarget):
        if target.sampled_logp is None:
            raise ObjectiveError(NO_SAMPLED_LOGP)
        return target.sampled_logp
    assert teacher_logp is not None
    return gather_logp(teacher_logp, response_ids)
