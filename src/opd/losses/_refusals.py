"""Every objective that would be wrong, empty, or read a setting it ignores: refused with what, why, and what to use instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

from opd.errors import ObjectiveError, did_you_mean
from opd.losses.divergences import Divergence, check_shape_parameters
from opd.losses.partial import Tail
from opd.losses.reduce import Reduction

if TYPE_CHECKING:
    from opd.losses.objective import Objective
else:
    Objective = Any  # that module imports this one

CHOICES: dict[str, tuple[str, ...]] = {
    "divergence": get_args(Divergence),
    "support": ("full", "teacher_top_k", "student_top_k", "union", "sampled"),
    "tail": get_args(Tail),
    "estimator": ("exact", "k1", "k2", "k3"),
    "delivery": ("loss", "advantage"),
    "baseline": ("none", "value"),
    "reduction": get_args(Reduction),
}
NUMBERS = ("beta", "alpha", "discount", "student_temperature", "teacher_temperature")
NUMBERS_OR_NONE = ("teacher_logp_floor", "fixed_count", "clip_range")
BETA_READERS = ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl", "alpha_beta_divergence")


def refuse_wrong(objective: Objective) -> None:
    """Raise ObjectiveError for the first thing that is wrong."""
    for rules in (_names, _types, _numbers, _divergence, _floor, _support, _estimator, _delivery, _reduction, _unread):
        for complaint in rules(objective):
            raise ObjectiveError(complaint)
    check_shape_parameters(objective.divergence, alpha=objective.alpha, beta=objective.beta)


def _names(o: Objective) -> Iterator[str]:
    if o.tail == "ignore":
        yield (
            "tail='ignore' is wrong: leaving out the mass outside the support makes it profitable to push probability out of "
            "the support, and training ends further from the teacher than it began; use tail='bucket'."
        )
    for name, choices in CHOICES.items():
        value = getattr(o, name)
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            yield f"{name}={value!r} is not known; use one of {', '.join(choices)}.{hint}"


def _types(o: Objective) -> Iterator[str]:
    for name in (*NUMBERS, *NUMBERS_OR_NONE):
        value = getattr(o, name)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number and not (value is None and name in NUMBERS_OR_NONE):
            yield f"{name}={value!r} must be a number{' or None' if name in NUMBERS_OR_NONE else ''}, without quotes."
    for name in ("normalize", "scale_by_t2"):
        if not isinstance(getattr(o, name), bool):
            yield f"{name}={getattr(o, name)!r} must be True or False."
    if isinstance(o.always_include, str) or not isinstance(o.always_include, Iterable):
        yield f"always_include={o.always_include!r} must be a tuple of token ids, e.g. (2,)."


def _numbers(o: Objective) -> Iterator[str]:
    for field in fields(o):
        value = getattr(o, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{field.name}={value} is not a finite number; every coefficient of a loss must be."
    if isinstance(o.top_k, bool) or not isinstance(o.top_k, int) or o.top_k < 1:
        yield f"top_k={o.top_k!r} must be a whole number ≥ 1; 64 is the default."
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in o.always_include):
        yield f"always_include={o.always_include} must be token ids ≥ 0."
    for whose in ("student", "teacher"):
        temperature = getattr(o, f"{whose}_temperature")
        if temperature <= 0:
            yield f"{whose}_temperature={temperature} must be > 0, because logits are divided by it; 1.0 leaves them alone."
    if not 0.0 <= o.discount <= 1.0:
        yield f"discount={o.discount} must be between 0 (one token) and 1 (all the rest of the response)."
    if o.clip_range is not None and o.clip_range <= 0:
        yield f"clip_range={o.clip_range} must be > 0; use None for no clipping."
    if o.teacher_logp_floor is not None and o.teacher_logp_floor >= 0:
        yield f"teacher_logp_floor={o.teacher_logp_floor} must be negative: it is a log-probability, for example −20."
    if o.reduction == "fixed" and (o.fixed_count is None or o.fixed_count <= 0):
        yield f"reduction='fixed' divides by fixed_count={o.fixed_count}, which must be > 0; use the tokens of a usual batch."


def _divergence(o: Objective) -> Iterator[str]:
    if o.divergence == "skew_reverse_kl" and o.beta == 0:
        yield "skew_reverse_kl with beta=0 is KL(S‖S), identically 0; use beta=1 for reverse KL, or anything between."
    if o.divergence == "skew_forward_kl" and o.beta == 1:
        yield "skew_forward_kl with beta=1 is KL(T‖T), identically 0; use beta=0 for forward KL, or anything between."
    if o.scale_by_t2 and o.student_temperature != o.teacher_temperature:
        yield (
            f"scale_by_t2 with student_temperature={o.student_temperature} and teacher_temperature={o.teacher_temperature}: "
            "the factor T² undoes one common division of the logits; set both alike or turn scale_by_t2 off."
        )
    if o.scale_by_t2 and o.student_temperature == 1:
        yield "scale_by_t2 with both temperatures at 1 multiplies by 1; set the temperatures, or turn scale_by_t2 off."
    if o.scale_by_t2 and o.delivery == "advantage":
        yield (
            "scale_by_t2 with delivery='advantage': T² makes up for gradients that flow through divided logits, and an advantage "
            "has no gradient; turn scale_by_t2 off."
        )


def takes_floor(o: Objective) -> bool:
    """Whether the teacher's log-probs stand only in log(p/q), weighed by the student: then they can be bounded from below."""
    name = o.divergence
    reverse = name == "reverse_kl" or (name in ("generalized_jsd", "skew_reverse_kl") and o.beta == 1)
    return reverse or o.support == "sampled"


def _floor(o: Objective) -> Iterator[str]:
    if o.teacher_logp_floor is not None and not takes_floor(o):
        yield (
            f"teacher_logp_floor={o.teacher_logp_floor} with {o.divergence}: the floor adds probability to every token of the vocabulary, "
            f"and {o.divergence} sums over it, so that the student would learn the floor; drop teacher_logp_floor, or use "
            "divergence='reverse_kl', which alone is infinite where the teacher gives 0."
        )


def _reduction(o: Objective) -> Iterator[str]:
    if o.reduction == "sequence_mean" and o.looks_at_sample:
        said = "support='sampled'" if o.support == "sampled" else "tail='sampled'"
        yield (
            f"reduction='sequence_mean' with {said}: a token's weight, 1 over the length of its response, depends on that token, so the "
            "expected gradient is not the divergence's, however large the batch (off by half of its size where lengths vary); use "
            "reduction='fixed' with fixed_count set to the response tokens of a usual step."
        )


def _support(o: Objective) -> Iterator[str]:
    partial = o.support in ("teacher_top_k", "student_top_k", "union")
    if partial and o.divergence == "alpha_beta_divergence":
        yield (
            f"alpha_beta_divergence with support='{o.support}': its powers of q do not add up over a tail, so the mass outside "
            "cannot be accounted for; use support='full', or divergence='generalized_jsd'."
        )
    if partial and o.tail == "renormalize" and o.top_k == 1:
        yield (
            "tail='renormalize' with top_k=1 is identically 0, because one renormalised probability is 1 on both sides; "
            "use tail='bucket' or a larger top_k."
        )
    if o.support == "sampled" and o.estimator == "exact":
        yield (
            "support='sampled' with estimator='exact': one token's log-prob does not determine a divergence; use "
            "estimator='k1' with delivery='advantage', or support='full'."
        )
    if o.support != "sampled" and o.estimator != "exact":
        yield (
            f"estimator='{o.estimator}' reads the sampled token only, but support='{o.support}' has more to offer; use "
            f"estimator='exact', or support='sampled'."
        )


def _estimator(o: Objective) -> Iterator[str]:
    if o.estimator == "k1" and o.delivery == "loss":
        yield (
            "estimator='k1' with delivery='loss': its expected gradient is 0, so nothing is learned; use delivery='advantage', "
            "or estimator='k2' as a loss."
        )
    if o.estimator == "k3" and o.delivery == "loss" and o.divergence != "forward_kl":
        yield (
            f"estimator='k3' as a loss has the gradient of forward KL, not of {o.divergence}; say divergence='forward_kl', or "
            "use estimator='k2' for reverse KL."
        )
    if o.estimator == "k2" and o.divergence != "reverse_kl":
        yield f"estimator='k2' has the gradient of reverse KL, not of {o.divergence}; say divergence='reverse_kl'."
    if o.estimator == "k1" and o.divergence != "reverse_kl":
        yield f"estimator='k1' estimates reverse KL, not {o.divergence}; say divergence='reverse_kl'."


def _delivery(o: Objective) -> Iterator[str]:
    if o.delivery == "advantage" and o.estimator == "exact":
        yield (
            "delivery='advantage' with estimator='exact': a divergence is the same number for every token that could have been "
            "sampled, so as an advantage its expected gradient is 0 and only variance is added; use delivery='loss', or "
            "estimator='k1'."
        )
    if o.delivery == "advantage" and o.estimator in ("k2", "k3"):
        yield (
            f"estimator='{o.estimator}' as an advantage points in a wrong direction: it is never negative, so it cannot tell too "
            "much probability from too little; use estimator='k1'."
        )
    for name, idle in (("baseline", "none"), ("discount", 0.0), ("clip_range", None)):
        value = getattr(o, name)
        if o.delivery == "loss" and value != idle:
            yield f"{name}={value!r} acts on an advantage, but delivery='loss' has none; use delivery='advantage' or drop it."


def _unread(o: Objective) -> Iterator[str]:
    """Settings that would silently do nothing."""
    if not o.normalize and o.divergence != "generalized_jsd":
        yield f"normalize=False is read by generalized_jsd only, not by {o.divergence}; drop it."
    if o.fixed_count is not None and o.reduction != "fixed":
        yield f"fixed_count={o.fixed_count} is read by reduction='fixed' only, not by {o.reduction}; drop it."
    if o.beta != 0.5 and o.divergence not in BETA_READERS:
        yield f"beta={o.beta} is not read by {o.divergence}; drop it, or use divergence='generalized_jsd'."
    if o.alpha != 0.5 and o.divergence != "alpha_beta_divergence":
        yield f"alpha={o.alpha} is not read by {o.divergence}; drop it, or use divergence='alpha_beta_divergence'."
    if o.support in ("full", "sampled"):
        if o.tail != "bucket":
            yield f"tail='{o.tail}' says what happens outside a top-k support, and support='{o.support}' has none; drop it."
        if o.always_include:
            yield f"always_include adds tokens to a top-k support, and support='{o.support}' has none; drop it."
