"""The settings of a distillation loss. Every one that would be wrong, empty or unread is refused with what, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from opd.errors import ObjectiveError, did_you_mean
from opd.losses.choices import Divergence, Reduction, Tail, check_shape_parameters, warn_if_faded
from opd.types import Target, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

VocabularySupport = Literal["full", "teacher_top_k", "student_top_k", "union", "sampled"]
Estimator = Literal["exact", "k1", "k2", "k3"]
Delivery = Literal["loss", "advantage"]
Baseline = Literal["none", "value"]

CHOICES: dict[str, tuple[str, ...]] = {
    "divergence": get_args(Divergence),
    "support": get_args(VocabularySupport),
    "tail": get_args(Tail),
    "estimator": get_args(Estimator),
    "delivery": get_args(Delivery),
    "baseline": get_args(Baseline),
    "reduction": get_args(Reduction),
}
TOP_K_SUPPORTS = ("teacher_top_k", "student_top_k", "union")
DEFAULT_TOP_K = 64
MIXTURES = ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl")  # divergences to M = βT + (1−β)S
READ_BY: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "beta": (0.5, "divergence", (*MIXTURES, "alpha_beta_divergence")),
    "alpha": (0.5, "divergence", ("alpha_beta_divergence",)),
    "normalize": (True, "divergence", ("generalized_jsd",)),
    "top_k": (DEFAULT_TOP_K, "support", TOP_K_SUPPORTS),
    "tail": ("bucket", "support", TOP_K_SUPPORTS),
}
"""Settings that some choices read: the value that None stands for there, the setting that decides, and its choices."""
NUMBERS = ("discount", "student_temperature", "teacher_temperature")
NUMBERS_OR_NONE = ("beta", "alpha", "teacher_logp_floor", "fixed_count", "clip_range")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Settings of an `Objective`, and the targets that can feed it. None is "not set": the default where the setting is read."""

    divergence: Divergence = "reverse_kl"
    """Divergence to minimise, student S against teacher T; reverse_kl is KL(S‖T)."""
    beta: float | None = None
    """Weight of the teacher in the mixture of generalized_jsd and skew_*, or the β of alpha_beta_divergence; 0.5 if not set."""
    alpha: float | None = None
    """The α of alpha_beta_divergence; 0.5 if not set."""
    normalize: bool | None = None
    """Divide generalized_jsd by β(1−β), which makes β a direction; False is the published form. True if not set."""
    support: VocabularySupport = "full"
    """Vocabulary entries that are compared at each position."""
    top_k: int | None = None
    """Tokens kept per position by the top_k supports and by union (of each side); 64 if not set."""
    tail: Tail | None = None
    """Treatment of the probability outside a top_k support; bucket if not set."""
    always_include: tuple[int, ...] = ()
    """Token ids added to every top_k support, such as EOS or the start of a tool call."""
    eos_groups: tuple[tuple[int, ...], ...] = ()
    """Groups of token ids that mean the same end of an answer: each counts as one action, with the sum of its probabilities, in both
    models. For the whole vocabulary at temperature 1."""
    estimator: Estimator = "exact"
    """exact sums over the support; k1, k2, k3 look at the sampled token only."""
    delivery: Delivery = "loss"
    """Differentiate the number, or use it as a per-token advantage of a policy gradient."""
    baseline: Baseline = "none"
    """value subtracts the advantage's expectation −KL(S‖T): same mean, mostly less variance."""
    discount: float = 0.0
    """Share of the later tokens' advantage that a token gets: 0 nothing, 1 all of it."""
    student_temperature: float = 1.0
    """Student logits are divided by this before the divergence; not the sampling temperature."""
    teacher_temperature: float = 1.0
    """Teacher logits are divided by this before the divergence."""
    scale_by_t2: bool = False
    """Multiply the loss by the square of the (common) temperature."""
    teacher_logp_floor: float | None = None
    """Raise teacher log-probs (nats) below this to it in log(p/q); the metric `clamped` tells how often. Read by reverse_kl, and by
    estimators of the sampled token."""
    reduction: Reduction = "token_mean"
    """Reduction of per-token losses to one number: mean over tokens, mean over sequences of their means, or a sum over fixed_count. Of
    losses that look at the sampled token, fixed alone has the exact expected gradient: token_mean is off by about 1 / (sequences of
    a step), and sequence_mean, which is off at every size, is refused."""
    fixed_count: float | None = None
    """Divisor of reduction=fixed."""
    clip_range: float | None = None
    """ε of the clipped probability ratio student / sampler; None does not clip."""

    def __post_init__(self) -> None:
        for name, (default, chooser, choices) in READ_BY.items():
            if getattr(self, name) is None and getattr(self, chooser) in choices:
                object.__setattr__(self, name, default)
        for complaint in self._complaints():
            raise ObjectiveError(complaint)
        if self.normalize is False:
            warn_if_faded(self.shape[1])

    @property
    def shape(self) -> tuple[float, float, bool]:
        """α, β and `normalize`; 0 and False where the divergence reads none."""
        return self.alpha or 0.0, self.beta or 0.0, bool(self.normalize)

    @property
    def looks_at_sample(self) -> bool:
        """The loss depends on which token was sampled; then its weights must not, see `reduction`."""
        return "sampled" in (self.support, self.tail)

    @property
    def takes_floor(self) -> bool:
        """The teacher's log-probs stand only in log(p/q), weighed by the student, and can be bounded from below."""
        reverse = self.divergence == "reverse_kl"
        reverse_limit = self.divergence in ("generalized_jsd", "skew_reverse_kl") and self.beta == 1
        return reverse or reverse_limit or self.support == "sampled"

    @property
    def needs(self) -> tuple[TargetKind, ...]:
        """Kinds of target that can feed this objective, best first."""
        # Log-probs that come without logits are of temperature 1 and of tokens that somebody else chose.
        from_logits: tuple[TargetKind, ...] = ("hidden", "dense")
        if self.teacher_temperature != 1.0:
            return from_logits
        if self.support == "sampled":
            return (*from_logits, "top_k") if self.baseline == "value" else (*from_logits, "sampled", "top_k")
        if self.support == "teacher_top_k" and not self.always_include:
            return (*from_logits, "top_k")
        return from_logits

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        defaults = {item.name: READ_BY.get(item.name, (item.default,))[0] for item in fields(self)}
        return {
            name: value for name, default in defaults.items() if (value := getattr(self, name)) not in (None, default)
        }

    def check_supplies(
        self, supplies: Collection[TargetKind], teacher_name: str, teacher_top_k: int | None = None
    ) -> TargetKind:
        """The best kind of target that this teacher has and this objective can use, or ObjectiveError."""
        best: TargetKind | None = next((kind for kind in self.needs if kind in supplies), None)
        if best is None:
            advice = [] if self.teacher_temperature == 1.0 else ["set teacher_temperature=1"]
            if "top_k" in supplies and self.support != "teacher_top_k":
                advice.append("use support=teacher_top_k with tail=bucket")
            elif "top_k" in supplies and self.always_include:
                advice.append("drop always_include")
            elif "sampled" in supplies:
                advice.append("use support=sampled with estimator=k1, delivery=advantage and baseline=none")
            advice.append("use a local teacher")
            has = " and ".join(_SUPPLY_WORDS[kind].format(k=teacher_top_k or "k") for kind in sorted(supplies))
            raise ObjectiveError(
                f"{self.divergence} needs {self._need()}, but teacher '{teacher_name}' supplies {has or 'nothing'}; "
                f"{', or '.join(advice)}."
            )
        if best == "top_k" and self.top_k is not None and teacher_top_k is not None and teacher_top_k < self.top_k:
            raise ObjectiveError(
                f"top_k={self.top_k} tokens are asked for, but teacher '{teacher_name}' supplies top-{teacher_top_k}; "
                f"set top_k={teacher_top_k}, or let the teacher return more."
            )
        return best

    def check_target(self, target: Target) -> None:
        """Raise ObjectiveError for a kind of target that cannot feed this objective."""
        if target.kind not in self.needs:
            raise ObjectiveError(
                f"{self.divergence} needs {self._need()}, but got a {type(target).__name__}; "
                f"give it a target of kind {' or '.join(self.needs)}."
            )

    def check_given(self, sampler_logp: Tensor | None, sequence_index: Tensor | None) -> None:
        """Raise ObjectiveError for settings that read a tensor which is missing."""
        if self.discount > 0 and sequence_index is None:
            raise ObjectiveError(
                f"discount={self.discount} adds up along a response; pass sequence_index, or set discount=0."
            )
        if self.clip_range is not None and sampler_logp is None:
            raise ObjectiveError(
                f"clip_range={self.clip_range} clips the ratio student / sampler; pass sampler_logp, or set clip_range=None."
            )

    def _need(self) -> str:
        if self.support in ("student_top_k", "union"):
            return "teacher log-probs of tokens that the student chooses"
        if self.teacher_temperature != 1.0:
            return f"teacher logits, to divide them by teacher_temperature={self.teacher_temperature},"
        if self.baseline == "value":
            return "more of the teacher's distribution than one token, for baseline=value"
        if self.support == "teacher_top_k":
            extra = f" and of tokens {self.always_include}" if self.always_include else ""
            return f"teacher log-probs of its top-{self.top_k}{extra}"
        return "every vocabulary entry" if self.support == "full" else "the teacher's log-prob of each sampled token"

    def _complaints(self) -> Iterator[str]:
        """Everything that is wrong; each rule may rely on those before it."""
        yield from self._wrong_types()
        yield from self._wrong_numbers()
        yield from self._wrong_divergence()
        yield from self._wrong_support()
        yield from self._wrong_delivery()
        yield from self._wrong_reduction()
        yield from self._unread()
        alpha, beta, _ = self.shape
        check_shape_parameters(self.divergence, alpha=alpha, beta=beta)

    def _wrong_types(self) -> Iterator[str]:
        if str(self.tail) == "ignore":
            yield (
                "tail='ignore' is wrong: leaving out the mass outside the support makes it profitable to push probability out of "
                "the support, and training ends further from the teacher than it began; use tail='bucket'."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in READ_BY):
                hint = did_you_mean(str(value), choices)
                yield f"{name}={value!r} is not known; use one of {', '.join(choices)}.{hint}"
        for name in (*NUMBERS, *NUMBERS_OR_NONE):
            value = getattr(self, name)
            number = not isinstance(value, bool) and isinstance(value, Real)
            if not number and not (value is None and name in NUMBERS_OR_NONE):
                yield f"{name}={value!r} must be a number{' or None' if name in NUMBERS_OR_NONE else ''}, without quotes."
        for name, allowed in (("normalize", (True, False, None)), ("scale_by_t2", (True, False))):
            value = getattr(self, name)
            if not any(value is one for one in allowed):
                yield f"{name}={value!r} must be True or False."
        tokens: Any = self.always_include
        if isinstance(tokens, str) or not isinstance(tokens, Iterable):
            yield f"always_include={tokens!r} must be a tuple of token ids, e.g. (2,)."
        groups: Any = self.eos_groups
        if not _is_listed(groups) or not all(map(_is_listed, groups)):
            yield f"eos_groups={groups!r} must be groups of token ids, e.g. [[2, 7]]."

    def _wrong_numbers(self) -> Iterator[str]:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{item.name}={value} is not a finite number; every coefficient of a loss must be."
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            yield f"top_k={self.top_k!r} must be a whole number ≥ 1; {DEFAULT_TOP_K} is the default."
        if any(not _is_whole(token) or token < 0 for token in self.always_include):
            yield f"always_include={self.always_include} must be token ids ≥ 0."
        grouped: list[Any] = [token for group in self.eos_groups for token in group]
        if any(not _is_whole(token) or token < 0 for token in grouped) or any(
            len(group) < 2 for group in self.eos_groups
        ):
            yield f"eos_groups={self.eos_groups} must be groups of two token ids ≥ 0 or more, e.g. [[2, 7]]."
        if len(set(grouped)) < len(grouped):
            yield f"eos_groups={self.eos_groups} names a token twice; each can belong to one group, once."
        for whose in ("student", "teacher"):
            temperature = getattr(self, f"{whose}_temperature")
            if temperature <= 0:
                yield f"{whose}_temperature={temperature} must be > 0, because logits are divided by it; 1.0 leaves them alone."
        if not 0.0 <= self.discount <= 1.0:
            yield f"discount={self.discount} must be between 0 (one token) and 1 (all the rest of the response)."
        if self.clip_range is not None and self.clip_range <= 0:
            yield f"clip_range={self.clip_range} must be > 0; use None for no clipping."
        if self.teacher_logp_floor is not None and self.teacher_logp_floor >= 0:
            yield f"teacher_logp_floor={self.teacher_logp_floor} must be negative: it is a log-probability, for example −20."
        if self.reduction == "fixed" and (self.fixed_count is None or self.fixed_count <= 0):
            yield f"reduction='fixed' divides by fixed_count={self.fixed_count}, which must be > 0; use the tokens of a usual batch."

    def _wrong_divergence(self) -> Iterator[str]:
        if self.divergence == "skew_reverse_kl" and self.beta == 0:
            yield "skew_reverse_kl with beta=0 is KL(S‖S), identically 0; use beta=1 for reverse KL, or anything between."
        if self.divergence == "skew_forward_kl" and self.beta == 1:
            yield "skew_forward_kl with beta=1 is KL(T‖T), identically 0; use beta=0 for forward KL, or anything between."
        if self.scale_by_t2 and self.student_temperature != self.teacher_temperature:
            yield (
                f"scale_by_t2 with student_temperature={self.student_temperature} and teacher_temperature={self.teacher_temperature}: "
                "the factor T² undoes one common division of the logits; set both alike or turn scale_by_t2 off."
            )
        if self.scale_by_t2 and self.student_temperature == 1:
            yield "scale_by_t2 with both temperatures at 1 multiplies by 1; set the temperatures, or turn scale_by_t2 off."
        if self.scale_by_t2 and self.delivery == "advantage":
            yield (
                "scale_by_t2 with delivery='advantage': T² makes up for gradients that flow through divided logits, and an advantage "
                "has no gradient; turn scale_by_t2 off."
            )
        if self.teacher_logp_floor is not None and not self.takes_floor:
            yield (
                f"teacher_logp_floor={self.teacher_logp_floor} with {self.divergence}: the floor adds probability to every token of the "
                f"vocabulary, and {self.divergence} sums over it, so that the student would learn the floor; drop teacher_logp_floor, or "
                "use divergence='reverse_kl', which alone is infinite where the teacher gives 0."
            )

    def _wrong_support(self) -> Iterator[str]:
        if self.support in TOP_K_SUPPORTS and self.divergence == "alpha_beta_divergence":
            yield (
                f"alpha_beta_divergence with support='{self.support}': its powers of q do not add up over a tail, so the mass outside "
                "cannot be accounted for; use support='full', or divergence='generalized_jsd'."
            )
        if self.tail == "renormalize" and self.top_k == 1:
            yield (
                "tail='renormalize' with top_k=1 is identically 0, because one renormalised probability is 1 on both sides; "
                "use tail='bucket' or a larger top_k."
            )
        if self.support == "sampled" and self.estimator == "exact":
            yield (
                "support='sampled' with estimator='exact': one token's log-prob does not determine a divergence; use "
                "estimator='k1' with delivery='advantage', or support='full'."
            )
        if self.support != "sampled" and self.estimator != "exact":
            yield (
                f"estimator='{self.estimator}' reads the sampled token only, but support='{self.support}' has more to offer; use "
                f"estimator='exact', or support='sampled'."
            )

    def _wrong_delivery(self) -> Iterator[str]:
        if self.estimator == "k1" and self.delivery == "loss":
            yield (
                "estimator='k1' with delivery='loss': its expected gradient is 0, so nothing is learned; use delivery='advantage', "
                "or estimator='k2' as a loss."
            )
        if self.estimator == "k3" and self.delivery == "loss" and self.divergence != "forward_kl":
            yield (
                f"estimator='k3' as a loss has the gradient of forward KL, not of {self.divergence}; say divergence='forward_kl', or "
                "use estimator='k2' for reverse KL."
            )
        if self.estimator == "k2" and self.divergence != "reverse_kl":
            yield f"estimator='k2' has the gradient of reverse KL, not of {self.divergence}; say divergence='reverse_kl'."
        if self.estimator == "k1" and self.divergence != "reverse_kl":
            yield f"estimator='k1' estimates reverse KL, not {self.divergence}; say divergence='reverse_kl'."
        if self.delivery == "advantage" and self.estimator == "exact":
            yield (
                "delivery='advantage' with estimator='exact': a divergence is the same number for every token that could have been "
                "sampled, so as an advantage its expected gradient is 0 and only variance is added; use delivery='loss', or "
                "estimator='k1'."
            )
        if self.delivery == "advantage" and self.estimator in ("k2", "k3"):
            yield (
                f"estimator='{self.estimator}' as an advantage points in a wrong direction: it is never negative, so it cannot tell too "
                "much probability from too little; use estimator='k1'."
            )
        for name, off in (("baseline", "none"), ("discount", 0.0), ("clip_range", None)):
            value = getattr(self, name)
            if self.delivery == "loss" and value != off:
                yield f"{name}={value!r} acts on an advantage, but delivery='loss' has none; use delivery='advantage' or drop it."

    def _wrong_reduction(self) -> Iterator[str]:
        if self.reduction == "sequence_mean" and self.looks_at_sample:
            said = "support='sampled'" if self.support == "sampled" else "tail='sampled'"
            yield (
                f"reduction='sequence_mean' with {said}: a token's weight, 1 over the length of its response, depends on that token, so the "
                "expected gradient is not the divergence's, however large the batch (off by half of its size where lengths vary); use "
                "reduction='fixed' with fixed_count set to the response tokens of a usual step."
            )
        if self.fixed_count is not None and self.reduction != "fixed":
            yield f"fixed_count={self.fixed_count} is read by reduction='fixed' only, not by {self.reduction}; drop it."

    def _unread(self) -> Iterator[str]:
        """Settings that would silently do nothing."""
        unread = {name for name, (_, chooser, choices) in READ_BY.items() if getattr(self, chooser) not in choices}
        unread = {name for name in unread if getattr(self, name) is not None}
        if "normalize" in unread:
            yield f"normalize={self.normalize} is read by generalized_jsd only, not by {self.divergence}; drop it."
        if "beta" in unread:
            yield f"beta={self.beta} is not read by {self.divergence}; drop it, or use divergence='generalized_jsd'."
        if "alpha" in unread:
            yield f"alpha={self.alpha} is not read by {self.divergence}; drop it, or use divergence='alpha_beta_divergence'."
        if "top_k" in unread:
            yield (
                f"top_k={self.top_k} is read by top-k supports, and support='{self.support}' looks at something else; set "
                "support='teacher_top_k', 'student_top_k' or 'union', or drop top_k."
            )
        if "tail" in unread:
            yield f"tail='{self.tail}' says what happens outside a top-k support, and support='{self.support}' has none; drop it."
        if self.always_include and self.support not in TOP_K_SUPPORTS:
            yield f"always_include adds tokens to a top-k support, and support='{self.support}' has none; drop it."
        if self.eos_groups and (
            self.support != "full" or (self.student_temperature, self.teacher_temperature) != (1, 1)
        ):
            yield (
                "eos_groups adds up probabilities of the whole vocabulary at temperature 1, which "
                f"support='{self.support}' with temperatures {self.student_temperature} and {self.teacher_temperature} does not have; use "
                "support='full' and temperatures of 1, or drop it."
            )


def _is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_SUPPLY_WORDS: dict[TargetKind, str] = {
    "sampled": "the sampled token's log-prob",
    "top_k": "top-{k}",
    "dense": "logits",
    "hidden": "hidden states",
}
