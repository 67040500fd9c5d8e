"""The settings of a distillation loss. Every one that would be wrong, empty or unread is refused with what, why, and what to do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from opd.errors import ObjectiveError
from opd.losses.choices import (
    READ_BY,
    Baseline,
    Delivery,
    Divergence,
    Estimator,
    Reduction,
    Tail,
    VocabularySupport,
    warn_if_faded,
)
from opd.losses.refusals import complaints
from opd.types import Target, TargetKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Settings of an `Objective`, and the targets that can feed it. None is "not set": the default where the setting is read."""

    divergence: Divergence = "reverse_kl"
    """Divergence to minimise, student S against teacher T; reverse_kl is KL(S‖T)."""
    beta: float | None = None
    """Weight of the teacher in the mixture of generalized_jsd and skew_*, or the β of alpha_beta_divergence; 0.5 if not set."""
    alpha: float | None = None
    """The α of alpha_beta_divergence, or the weight of forward KL in forward_reverse_kl; 0.5 if not set."""
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
    include_sampled: bool = False
    """Add the response token to every top_k support, with the teacher's log-prob of it. It counts as often as it is drawn, once, so that
    what is outside the top k is seen in part, with little variance and a bias; tail=sampled has no bias and more variance."""
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
    token_clip: float | None = None
    """Largest loss of a token, above which it has no gradient; with delivery=advantage, the largest size of its advantage. Both bias the
    expected gradient; the metric `clamped` tells how often. None bounds nothing."""
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
        for complaint in complaints(self):
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
    def reads_response_token(self) -> bool:
        """The response token's log-probs, of both models, are part of the loss."""
        return self.looks_at_sample or self.include_sampled

    @property
    def takes_floor(self) -> bool:
        """The teacher's log-probs stand only in log(p/q), weighed by the student, and can be bounded from below."""
        reverse = self.divergence == "reverse_kl"
        reverse_limit = self.divergence in ("generalized_jsd", "skew_reverse_kl") and self.beta == 1
        reverse_limit |= self.divergence == "forward_reverse_kl" and self.alpha == 0
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


_SUPPLY_WORDS: dict[TargetKind, str] = {
    "sampled": "the sampled token's log-prob",
    "top_k": "top-{k}",
    "dense": "logits",
    "hidden": "hidden states",
}
