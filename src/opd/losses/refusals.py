"""Combinations of a loss's settings that would be wrong, empty or unread, each with what, why, and what to do. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from opd.errors import did_you_mean
from opd.losses.choices import (
    CHOICES,
    DEFAULT_TOP_K,
    READ_BY,
    TOP_K_SUPPORTS,
    check_shape_parameters,
)

if TYPE_CHECKING:
    from opd.losses.settings import ObjectiveSettings

NUMBERS = ("discount", "student_temperature", "teacher_temperature")
NUMBERS_OR_NONE = ("beta", "alpha", "teacher_logp_floor", "fixed_count", "clip_range", "token_clip")


def complaints(settings: ObjectiveSettings) -> Iterator[str]:
    """Everything that is wrong; each rule may rely on those before it."""
    yield from _wrong_types(settings)
    yield from _wrong_numbers(settings)
    yield from _wrong_divergence(settings)
    yield from _wrong_support(settings)
    yield from _wrong_delivery(settings)
    yield from _wrong_reduction(settings)
    yield from _unread(settings)
    alpha, beta, _ = settings.shape
    check_shape_parameters(settings.divergence, alpha=alpha, beta=beta)


def _wrong_types(settings: ObjectiveSettings) -> Iterator[str]:
    if str(settings.tail) == "ignore":
        yield (
            "tail='ignore' is wrong: leaving out the mass outside the support makes it profitable to push probability out of "
            "the support, and training ends further from the teacher than it began; use tail='bucket'."
        )
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices and not (value is None and name in READ_BY):
            hint = did_you_mean(str(value), choices)
            yield f"{name}={value!r} is not known; use one of {', '.join(choices)}.{hint}"
    for name in (*NUMBERS, *NUMBERS_OR_NONE):
        value = getattr(settings, name)
        number = not isinstance(value, bool) and isinstance(value, Real)
        if not number and not (value is None and name in NUMBERS_OR_NONE):
            yield f"{name}={value!r} must be a number{' or None' if name in NUMBERS_OR_NONE else ''}, without quotes."
    flags = {"normalize": (True, False, None), "scale_by_t2": (True, False), "include_sampled": (True, False)}
    for name, allowed in flags.items():
        value = getattr(settings, name)
        if not any(value is one for one in allowed):
            yield f"{name}={value!r} must be True or False."
    tokens: Any = settings.always_include
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        yield f"always_include={tokens!r} must be a tuple of token ids, e.g. (2,)."
    groups: Any = settings.eos_groups
    if not _is_listed(groups) or not all(map(_is_listed, groups)):
        yield f"eos_groups={groups!r} must be groups of token ids, e.g. [[2, 7]]."


def _wrong_numbers(settings: ObjectiveSettings) -> Iterator[str]:
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{item.name}={value} is not a finite number; every coefficient of a loss must be."
    if settings.top_k is not None and (not _is_whole(settings.top_k) or settings.top_k < 1):
        yield f"top_k={settings.top_k!r} must be a whole number ≥ 1; {DEFAULT_TOP_K} is the default."
    if any(not _is_whole(token) or token < 0 for token in settings.always_include):
        yield f"always_include={settings.always_include} must be token ids ≥ 0."
    grouped: list[Any] = [token for group in settings.eos_groups for token in group]
    if any(not _is_whole(token) or token < 0 for token in grouped) or any(
        len(group) < 2 for group in settings.eos_groups
    ):
        yield f"eos_groups={settings.eos_groups} must be groups of two token ids ≥ 0 or more, e.g. [[2, 7]]."
    if len(set(grouped)) < len(grouped):
        yield f"eos_groups={settings.eos_groups} names a token twice; each can belong to one group, once."
    for whose in ("student", "teacher"):
        temperature = getattr(settings, f"{whose}_temperature")
        if temperature <= 0:
            yield f"{whose}_temperature={temperature} must be > 0, because logits are divided by it; 1.0 leaves them alone."
    if not 0.0 <= settings.discount <= 1.0:
        yield f"discount={settings.discount} must be between 0 (one token) and 1 (all the rest of the response)."
    if settings.clip_range is not None and settings.clip_range <= 0:
        yield f"clip_range={settings.clip_range} must be > 0; use None for no clipping."
    if settings.token_clip is not None and settings.token_clip <= 0:
        yield f"token_clip={settings.token_clip} must be > 0, because a bound of 0 leaves no token a gradient; use None for no bound."
    if settings.teacher_logp_floor is not None and settings.teacher_logp_floor >= 0:
        yield f"teacher_logp_floor={settings.teacher_logp_floor} must be negative: it is a log-probability, for example −20."
    if settings.reduction == "fixed" and (settings.fixed_count is None or settings.fixed_count <= 0):
        yield f"reduction='fixed' divides by fixed_count={settings.fixed_count}, which must be > 0; use the tokens of a usual batch."


def _wrong_divergence(settings: ObjectiveSettings) -> Iterator[str]:
    if settings.divergence == "skew_reverse_kl" and settings.beta == 0:
        yield "skew_reverse_kl with beta=0 is KL(S‖S), identically 0; use beta=1 for reverse KL, or anything between."
    if settings.divergence == "skew_forward_kl" and settings.beta == 1:
        yield "skew_forward_kl with beta=1 is KL(T‖T), identically 0; use beta=0 for forward KL, or anything between."
    if settings.scale_by_t2 and settings.student_temperature != settings.teacher_temperature:
        yield (
            f"scale_by_t2 with student_temperature={settings.student_temperature} and teacher_temperature={settings.teacher_temperature}: "
            "the factor T² undoes one common division of the logits; set both alike or turn scale_by_t2 off."
        )
    if settings.scale_by_t2 and settings.student_temperature == 1:
        yield "scale_by_t2 with both temperatures at 1 multiplies by 1; set the temperatures, or turn scale_by_t2 off."
    if settings.scale_by_t2 and settings.delivery == "advantage":
        yield (
            "scale_by_t2 with delivery='advantage': T² makes up for gradients that flow through divided logits, and an advantage "
            "has no gradient; turn scale_by_t2 off."
        )
    if settings.teacher_logp_floor is not None and not settings.takes_floor:
        yield (
            f"teacher_logp_floor={settings.teacher_logp_floor} with {settings.divergence}: the floor adds probability to every token of the "
            f"vocabulary, and {settings.divergence} sums over it, so that the student would learn the floor; drop teacher_logp_floor, or "
            "use divergence='reverse_kl', in which the floor stands beside the student's probability alone."
        )


def _wrong_support(settings: ObjectiveSettings) -> Iterator[str]:
    if settings.support in TOP_K_SUPPORTS and settings.divergence == "alpha_beta_divergence":
        yield (
            f"alpha_beta_divergence with support='{settings.support}': its powers of q do not add up over a tail, so the mass outside "
            "cannot be accounted for; use support='full', or divergence='generalized_jsd'."
        )
    if settings.tail == "renormalize" and settings.top_k == 1:
        yield (
            "tail='renormalize' with top_k=1 is identically 0, because one renormalised probability is 1 on both sides; "
            "use tail='bucket' or a larger top_k."
        )
    if settings.include_sampled and settings.tail == "sampled":
        yield (
            "include_sampled with tail='sampled': the tail counts a response token outside the top k over its probability, which has the right "
            "mean, and inside the support it would be counted once; drop include_sampled, or use tail='bucket'."
        )
    if settings.support == "sampled" and settings.estimator == "exact":
        yield (
            "support='sampled' with estimator='exact': one token's log-prob does not determine a divergence; use "
            "estimator='k1' with delivery='advantage', or support='full'."
        )
    if settings.support != "sampled" and settings.estimator != "exact":
        yield (
            f"estimator='{settings.estimator}' reads the sampled token only, but support='{settings.support}' has more to offer; use "
            f"estimator='exact', or support='sampled'."
        )


def _wrong_delivery(settings: ObjectiveSettings) -> Iterator[str]:
    if settings.estimator == "k1" and settings.delivery == "loss":
        yield (
            "estimator='k1' with delivery='loss': its expected gradient is 0, so nothing is learned; use delivery='advantage', "
            "or estimator='k2' as a loss."
        )
    if settings.estimator == "k3" and settings.delivery == "loss" and settings.divergence != "forward_kl":
        yield (
            f"estimator='k3' as a loss has the gradient of forward KL, not of {settings.divergence}; say divergence='forward_kl', or "
            "use estimator='k2' for reverse KL."
        )
    if settings.estimator == "k2" and settings.divergence != "reverse_kl":
        yield f"estimator='k2' has the gradient of reverse KL, not of {settings.divergence}; say divergence='reverse_kl'."
    if settings.estimator == "k1" and settings.divergence != "reverse_kl":
        yield f"estimator='k1' estimates reverse KL, not {settings.divergence}; say divergence='reverse_kl'."
    if settings.delivery == "advantage" and settings.estimator == "exact":
        yield (
            "delivery='advantage' with estimator='exact': a divergence is the same number for every token that could have been "
            "sampled, so as an advantage its expected gradient is 0 and only variance is added; use delivery='loss', or "
            "estimator='k1'."
        )
    if settings.delivery == "advantage" and settings.estimator in ("k2", "k3"):
        yield (
            f"estimator='{settings.estimator}' as an advantage points in a wrong direction: it is never negative, so it cannot tell too "
            "much probability from too little; use estimator='k1'."
        )
    for name, off in (("baseline", "none"), ("discount", 0.0), ("clip_range", None)):
        value = getattr(settings, name)
        if settings.delivery == "loss" and value != off:
            yield f"{name}={value!r} acts on an advantage, but delivery='loss' has none; use delivery='advantage' or drop it."


def _wrong_reduction(settings: ObjectiveSettings) -> Iterator[str]:
    if settings.reduction == "sequence_mean" and settings.looks_at_sample:
        said = "support='sampled'" if settings.support == "sampled" else "tail='sampled'"
        yield (
            f"reduction='sequence_mean' with {said}: a token's weight, 1 over the length of its response, depends on that token, so the "
            "expected gradient is not the divergence's, however large the batch (off by half of its size where lengths vary); use "
            "reduction='fixed' with fixed_count set to the response tokens of a usual step."
        )
    if settings.fixed_count is not None and settings.reduction != "fixed":
        yield f"fixed_count={settings.fixed_count} is read by reduction='fixed' only, not by {settings.reduction}; drop it."


def _unread(settings: ObjectiveSettings) -> Iterator[str]:
    """Settings that would silently do nothing."""
    unread = {name for name, (_, chooser, choices) in READ_BY.items() if getattr(settings, chooser) not in choices}
    unread = {name for name in unread if getattr(settings, name) is not None}
    if "normalize" in unread:
        yield f"normalize={settings.normalize} is read by generalized_jsd only, not by {settings.divergence}; drop it."
    if "beta" in unread:
        yield f"beta={settings.beta} is not read by {settings.divergence}; drop it, or use divergence='generalized_jsd'."
    if "alpha" in unread:
        yield f"alpha={settings.alpha} is not read by {settings.divergence}; drop it, or use divergence='forward_reverse_kl' or 'alpha_beta_divergence'."
    if "top_k" in unread:
        yield (
            f"top_k={settings.top_k} is read by top-k supports, and support='{settings.support}' looks at something else; set "
            "support='teacher_top_k', 'student_top_k' or 'union', or drop top_k."
        )
    if "tail" in unread:
        yield f"tail='{settings.tail}' says what happens outside a top-k support, and support='{settings.support}' has none; drop it."
    if settings.always_include and settings.support not in TOP_K_SUPPORTS:
        yield f"always_include adds tokens to a top-k support, and support='{settings.support}' has none; drop it."
    if settings.include_sampled and settings.support not in TOP_K_SUPPORTS:
        yield f"include_sampled adds the response token to a top-k support, and support='{settings.support}' has none; drop it."
    if settings.eos_groups and (
        settings.support != "full" or (settings.student_temperature, settings.teacher_temperature) != (1, 1)
    ):
        yield (
            "eos_groups adds up probabilities of the whole vocabulary at temperature 1, which "
            f"support='{settings.support}' with temperatures {settings.student_temperature} and {settings.teacher_temperature} does not have; use "
            "support='full' and temperatures of 1, or drop it."
        )


def _is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
