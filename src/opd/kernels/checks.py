"""Refusals, before any product is run: what is wrong, why it matters, what to do."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from opd.errors import NonFiniteError, ObjectiveError
from opd.kernels.spec import PolicyTerm, RowSpec
from opd.losses.mixtures import WEIGHT_SUM_TOLERANCE
from opd.types import AnyTarget, DenseTarget, HiddenTarget, SampledTarget, TeacherMixture, TopKTarget

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32)
MIXTURES = ("probability", "logit", "loss")

_found_finite: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()


def check_shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: AnyTarget | None,
    token_weights: Tensor | None,
    response_ids: Tensor | None,
    sampler_logp: Tensor | None,
    policy: PolicyTerm | None,
) -> None:
    """Raise ObjectiveError for shapes, dtypes and devices that do not fit together."""
    _check_head("student", hidden, weight, bias)
    tokens, device = hidden.shape[0], hidden.device
    per_token = {"token_weights": token_weights, "response_ids": response_ids, "sampler_logp": sampler_logp}
    if policy is not None:
        per_token |= {
            "policy.advantages": policy.advantages,
            "policy.old_log_prob": policy.old_log_prob,
            "policy.importance_weights": policy.importance_weights,
        }
        if response_ids is None:
            raise ObjectiveError("a policy term is about the response tokens; pass response_ids.")
    for name, value in per_token.items():
        if value is None:
            continue
        if value.shape != (tokens,):
            raise ObjectiveError(
                f"{name} has shape {tuple(value.shape)}, but there are {tokens} tokens; one number per token."
            )
        if name == "response_ids" and value.dtype not in IDS:
            raise ObjectiveError(f"{name} must be whole numbers, int64 or int32, not {value.dtype}.")
        if name != "response_ids" and not value.is_floating_point():
            raise ObjectiveError(f"{name} must be floating point, not {value.dtype}.")
        _same_device(name, value, device)
    _check_target(target, tokens, device)


def _check_head(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ObjectiveError(
            f"the {whose}'s hidden states must be [tokens, hidden] and its weight [vocab, hidden], but they are "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; flatten batch and length first."
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ObjectiveError(
            f"the {whose}'s hidden states have {hidden.shape[1]} features and its weight {weight.shape[1]}: they belong to "
            f"different models, or the weight is transposed (it must be [vocab, hidden])."
        )
    if hidden.dtype not in FLOATS or weight.dtype != hidden.dtype:
        raise ObjectiveError(
            f"the {whose}'s hidden states are {hidden.dtype} and its weight {weight.dtype}; cast one to the other's "
            "floating-point dtype, so that it is clear in what precision the product runs."
        )
    _same_device(f"the {whose}'s weight", weight, hidden.device)
    if bias is None:
        return
    if bias.shape != (weight.shape[0],) or not bias.is_floating_point():
        raise ObjectiveError(
            f"the {whose}'s bias has shape {tuple(bias.shape)} and dtype {bias.dtype}, but its weight has {weight.shape[0]} rows; "
            "one floating-point number per row."
        )
    _same_device(f"the {whose}'s bias", bias, hidden.device)


def _same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ObjectiveError(
            f"{name} is on {value.device}, but the student's hidden states are on {device}; move it there."
        )


def _check_target(target: AnyTarget | None, tokens: int, device: torch.device) -> None:
    if target is None:
        return
    if isinstance(target, TeacherMixture):
        _check_mixture(target, tokens, device)
        return
    if isinstance(target, HiddenTarget):
        _check_head("teacher", target.hidden, target.head.weight, target.head.bias)
        rows = target.hidden
    elif isinstance(target, DenseTarget):
        rows = target.logits
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ObjectiveError(
                f"teacher logits must be floating point [tokens, vocab], not {rows.dtype} {tuple(rows.shape)}."
            )
    elif isinstance(target, TopKTarget):
        rows = target.ids
        if rows.dim() != 2 or rows.shape != target.teacher_logp.shape or rows.shape[1] == 0 or rows.dtype not in IDS:
            raise ObjectiveError(
                f"a TopKTarget needs ids and teacher_logp of one shape [tokens, k], but they are {tuple(rows.shape)} ({rows.dtype}) and "
                f"{tuple(target.teacher_logp.shape)}."
            )
        _check_logp("TopKTarget.teacher_logp", target.teacher_logp, 2, device)
        if target.sampled_logp is not None:
            _check_logp("TopKTarget.sampled_logp", target.sampled_logp, 1, device)
            if target.sampled_logp.shape[0] != rows.shape[0]:
                raise ObjectiveError(
                    f"TopKTarget.sampled_logp has {target.sampled_logp.shape[0]} numbers and ids {rows.shape[0]} rows; one per token."
                )
    elif isinstance(target, SampledTarget):
        rows = target.teacher_logp
        _check_logp("SampledTarget.teacher_logp", rows, 1, rows.device)
    else:
        raise ObjectiveError(
            f"target is a {type(target).__name__}; use a HiddenTarget, DenseTarget, TopKTarget, SampledTarget or TeacherMixture "
            "from opd.types and opd.kernels, or None."
        )
    if rows.shape[0] != tokens:
        raise ObjectiveError(
            f"the target has {rows.shape[0]} tokens and the student {tokens}: row t of a target is the teacher's view of response "
            "token t; look for a mask or a shift that only one of them got."
        )
    _same_device("the target", rows, device)


def _check_logp(name: str, logp: Tensor, dims: int, device: torch.device) -> None:
    if logp.dim() != dims or not logp.is_floating_point():
        shape = "[tokens]" if dims == 1 else "[tokens, k]"
        raise ObjectiveError(f"{name} must be floating point {shape}, not {logp.dtype} {tuple(logp.shape)}.")
    _same_device(name, logp, device)


def _check_mixture(mixture: TeacherMixture, tokens: int, device: torch.device) -> None:
    if mixture.mixture not in MIXTURES:
        raise ObjectiveError(f"mixture={mixture.mixture!r} is not one of {', '.join(MIXTURES)}.")
    for member in mixture.targets:
        if not isinstance(member, (HiddenTarget, DenseTarget)):
            raise ObjectiveError(
                f"a mixture needs whole distributions, but one member is a {type(member).__name__}; use HiddenTarget or DenseTarget, "
                "or add the losses of several calls."
            )
        _check_target(member, tokens, device)
    weights = mixture.weights
    if weights.shape not in ((len(mixture.targets),), (tokens, len(mixture.targets))) or not mixture.targets:
        raise ObjectiveError(
            f"{len(mixture.targets)} teachers, but weights of shape {tuple(weights.shape)}; give [teachers] or [tokens, teachers]."
        )
    _same_device("the mixture's weights", weights, device)
    if not bool((weights >= 0).all() and ((weights.sum(-1) - 1).abs() <= WEIGHT_SUM_TOLERANCE).all()):
        raise ObjectiveError("teacher weights must be ≥ 0 and sum to 1 at every token; divide them by their sum.")


def _check_groups(rows: RowSpec) -> None:
    groups, vocab = rows.objective.eos_groups, rows.columns.vocab
    if not groups:
        return
    beyond = [token for group in groups for token in group if token >= vocab]
    if beyond:
        raise ObjectiveError(
            f"eos_groups={groups} names token {beyond[0]}, and both models have {vocab} entries in common; drop it."
        )
    if rows.policy is not None:
        raise ObjectiveError(
            "eos_groups beside a policy term: its probabilities are those of single tokens, which were drawn, and not of groups; drop one."
        )


def check_rows(rows: RowSpec, token_weights: Tensor) -> None:
    """Raise ObjectiveError for numbers out of range and combinations that make no loss."""
    target, objective = rows.target, rows.objective
    for name, value in (("entropy_bonus", rows.entropy_bonus), ("distill_weight", rows.distill_weight)):
        if not math.isfinite(value):
            raise ObjectiveError(f"{name}={value} must be a finite number.")
    if rows.entropy_bonus < 0:
        raise ObjectiveError(f"entropy_bonus={rows.entropy_bonus} must be ≥ 0; below it would push entropy down.")
    if target is None and not rows.has_extras:
        raise ObjectiveError("target, policy and entropy_bonus are all missing: there is nothing to compute.")
    if target is not None and rows.distill_weight == 0:
        raise ObjectiveError(
            "distill_weight=0 with a target would pay for a teacher that has no say; pass target=None."
        )
    _check_policy(rows.policy, token_weights)
    _check_groups(rows)
    check_ids("response_ids", rows.response_ids, rows.columns.vocab)
    check_ids("TopKTarget.ids", target.ids if isinstance(target, TopKTarget) else None, rows.columns.vocab)
    if isinstance(target, (TopKTarget, SampledTarget)) and objective.teacher_temperature != 1.0:
        raise ObjectiveError(
            f"teacher_temperature={objective.teacher_temperature} needs the teacher's logits, but the target holds log-probs at "
            "temperature 1; use a HiddenTarget or a DenseTarget, or teacher_temperature=1."
        )
    if target is not None and not isinstance(target, TeacherMixture):
        objective.check_target(target)
    if isinstance(target, SampledTarget) and rows.response_ids is None:
        raise ObjectiveError("a SampledTarget is about the response tokens; pass response_ids.")
    looks_at_response = "sampled" in (objective.tail, objective.support)
    if (
        isinstance(target, TopKTarget)
        and looks_at_response
        and (target.sampled_logp is None or rows.response_ids is None)
    ):
        raise ObjectiveError(
            "this loss looks at the response token: pass response_ids, and sampled_logp in the TopKTarget."
        )


def _check_policy(policy: PolicyTerm | None, weights: Tensor) -> None:
    if policy is None:
        return
    clip = policy.clip_range
    bounds = clip if isinstance(clip, tuple) else (clip, clip)
    usable = len(bounds) == 2 and all(isinstance(b, (int, float)) and math.isfinite(b) and b > 0 for b in bounds)
    if clip is not None and not usable:
        raise ObjectiveError(f"policy.clip_range={clip} must be > 0 and finite, or (low, high); None does not clip.")
    if policy.likelihood and (clip is not None or policy.old_log_prob is not None):
        raise ObjectiveError(
            "policy.likelihood=True is a cross-entropy, in which nothing is divided by an old probability nor clipped; drop old_log_prob and "
            "clip_range, or likelihood."
        )
    if not math.isfinite(policy.weight):
        raise ObjectiveError(f"policy.weight={policy.weight} must be a finite number.")
    for name in ("advantages", "old_log_prob", "importance_weights"):
        _finite_rows(f"policy.{name}", getattr(policy, name), masked=name == "old_log_prob", weights=weights)


def check_ids(name: str, ids: Tensor | None, vocab: int) -> None:
    """Raise ObjectiveError for ids outside the common vocabulary."""
    if ids is None or not ids.numel():
        return
    wrong = (ids < 0) | (ids >= vocab)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ObjectiveError(
            f"{name} has {int(ids[wrong][0])} at token {row}, but the common vocabulary has {vocab} entries; student and "
            "teacher must use the same tokenizer, and masked tokens need a valid id too."
        )


def check_finite(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_weights: Tensor, rows: RowSpec | None = None
) -> None:
    """Raise NonFiniteError that names the first row of an input with a NaN or an infinity (−inf is a bias or a logit of a masked token).

    Rows of tokens of weight 0 may hold anything: they take no part.
    """
    weights = token_weights
    _finite_rows("student_hidden", hidden, weights=weights)
    _finite_rows("student_weight", weight)
    _finite_rows("token_weights", weights)
    _finite_rows("bias", bias, masked=True)
    if rows is None:
        return
    _finite_rows("sampler_logp", rows.sampler_logp, masked=True, weights=weights)
    target = rows.target
    for member in target.targets if isinstance(target, TeacherMixture) else (target,):
        if isinstance(member, HiddenTarget):
            _finite_rows("the teacher's hidden states", member.hidden, weights=weights)
            _finite_once("the teacher's weight", member.head.weight)
            _finite_rows("the teacher's bias", member.head.bias, masked=True)
        elif isinstance(member, DenseTarget):
            _finite_rows("the teacher's logits", member.logits, masked=True, weights=weights)
        elif isinstance(member, (TopKTarget, SampledTarget)):
            _finite_rows("the teacher's log-probs", member.teacher_logp, masked=True, weights=weights)


def _finite_once(name: str, weight: Tensor) -> None:
    """A frozen weight is searched the first time, and again when it was written to: it is read from memory for nothing else."""
    if weight.requires_grad or weight.is_inference():
        _finite_rows(name, weight)
        return
    try:
        state = (weight.data_ptr(), weight._version)
    except RuntimeError:  # made inside torch.func: it has no memory of its own
        _finite_rows(name, weight)
        return
    if _found_finite.get(weight) != state:
        _finite_rows(name, weight)
        _found_finite[weight] = state


def _finite_rows(name: str, value: Tensor | None, masked: bool = False, weights: Tensor | None = None) -> None:
    if (
        value is None
        or not value.numel()
        or bool(value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite())
    ):
        return
    wrong = value.isnan() | (value == torch.inf) if masked else ~value.isfinite()
    if weights is not None:
        wrong &= (weights != 0).view(-1, *[1] * (value.dim() - 1))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise NonFiniteError(
            f"{name} has {float(value[wrong][0])} in row {row}, so the loss and every gradient would be NaN; look at the model or batch "
            "that it comes from."
        )
