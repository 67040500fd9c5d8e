"""The sections of a recipe that say what is learnt from: rollouts, a reward, several teachers. Starts no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import ClassVar, Literal

from opd.config.sections import Section
from opd.errors import ConfigError, require
from opd.losses import WEIGHT_SUM_TOLERANCE, Combine, Hybrid, Objective, Scale, Schedule, moving


class RolloutConfig(Section, key="rollout"):
    """How the student's answers are drawn."""

    max_new_tokens: int = 256
    """Length limit of a response, EOS included. A response cut here does not supervise EOS."""
    horizon_start: int | None = None
    """Progressive horizon: responses end at this length at first, and at max_new_tokens from step horizon_steps on; None is off."""
    horizon_steps: int | None = None
    """Steps from horizon_start to max_new_tokens; None is half of the run."""
    temperature: float = 1.0
    """Sampling temperature. 1.0 keeps the samples on-policy for a loss at temperature 1."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    batch_size: int = 256
    """Rows generated at once; lower it when generation runs out of memory."""
    lmbda: float = 1.0
    """Share of on-policy samples (the λ of arXiv 2306.13649), drawn per sample; the rest come from `off_policy`."""
    off_policy: Literal["dataset", "teacher"] = "dataset"
    """Source of the other 1 − lmbda: the data set's response column, or the teacher's own samples."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"rollout.max_new_tokens must be at least 1, not {self.max_new_tokens}")
        start = self.horizon_start
        require(
            start is None or 1 <= start <= self.max_new_tokens,
            f"rollout.horizon_start must lie between 1 and rollout.max_new_tokens={self.max_new_tokens}, not {start}",
        )
        require(
            self.horizon_steps is None or (start is not None and self.horizon_steps >= 1),
            f"rollout.horizon_steps={self.horizon_steps} is how long the horizon grows from rollout.horizon_start, which is not set or "
            "takes no step; set both (steps ≥ 1), or neither.",
        )
        require(
            math.isfinite(self.temperature) and self.temperature > 0,
            f"rollout.temperature must be a positive number, not {self.temperature}: training needs samples of the "
            "student's own distribution, and greedy decoding is not one. Use 1.0.",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], not {self.top_p}; 1.0 switches it off")
        require(self.top_k >= 0, f"rollout.top_k must be 0 (off) or positive, not {self.top_k}")
        require(self.batch_size >= 1, f"rollout.batch_size must be at least 1, not {self.batch_size}")
        require(0 <= self.lmbda <= 1, f"rollout.lmbda is a share of samples, from 0 to 1, not {self.lmbda}")
        require(
            self.lmbda < 1 or self.off_policy == "dataset",
            "rollout.off_policy=teacher is read where rollout.lmbda < 1; lmbda=1 samples from the student alone. Lower lmbda, or drop it.",
        )
        require(all(self.stop), "rollout.stop holds an empty string, which would end every response at once")

    def horizon(self, step: int, total_steps: int) -> int:
        """The length limit of this step's responses."""
        if self.horizon_start is None:
            return self.max_new_tokens
        steps = self.horizon_steps or max(1, total_steps // 2)
        grown = Schedule(kind="linear", start=self.horizon_start, end=self.max_new_tokens, steps=steps).at(step)
        return round(grown)


class RewardConfig(Section, key="reward"):
    """How rewards are called, in training and in evaluation."""

    timeout: float = 10.0
    """Seconds that a reward may take for one response; 0 sets no limit."""
    on_error: Literal["stop", "zero"] = "stop"
    """A reward that raises, takes too long or returns no finite number ends the run, or counts as 0 (metric: reward/failed)."""

    def __post_init__(self) -> None:
        ok = math.isfinite(self.timeout) and self.timeout >= 0
        require(ok, f"reward.timeout must be 0 (no limit) or a positive number of seconds, not {self.timeout}")


class HybridConfig(Section, key="rl"):
    """Weights of distillation and of a reward's loss, and how the two make one. Shared by the recipe and verl's `opd.rl`."""

    weight: float = 0.0
    """λ_rl, the weight of the policy gradient. How responses of different length share it is objective.reduction: sequence_mean is
    GRPO's own, token_mean counts every token alike, fixed removes the bias towards long answers (arXiv 2503.20783)."""
    weight_end: float | None = None
    """λ_rl moves from `weight` to this, linearly; None keeps it."""
    distill_weight: float = 1.0
    """λ_distill, the weight of the distillation loss; 0 is pure reinforcement learning, which needs no teacher."""
    distill_weight_end: float | None = None
    """λ_distill moves from `distill_weight` to this, linearly; None keeps it."""
    schedule_steps: int | None = None
    """Steps that both moves take; None is the whole run."""
    combine: Combine = "losses"
    """With distillation: add the two losses, or the two per-token advantages (objective.delivery=advantage)."""
    scale: Scale = "none"
    """match divides both terms by their standard deviation over the batch before they are weighed: one more forward pass."""

    def __post_init__(self) -> None:
        for name in ("weight", "weight_end", "distill_weight", "distill_weight_end"):
            check_not_negative(f"rl.{name}", getattr(self, name))
        steps = self.schedule_steps
        require(steps is None or steps >= 1, f"rl.schedule_steps must be at least 1, not {steps}")
        ends = [self.weight if self.weight_end is None else self.weight_end]
        ends.append(self.distill_weight if self.distill_weight_end is None else self.distill_weight_end)
        require(
            max(self.weight, self.distill_weight) > 0 and max(ends) > 0,
            "rl.weight and rl.distill_weight are both 0 at the start or at the end, so there is nothing to train on; make one of them "
            "positive.",
        )
        moves = self.weight_end is not None or self.distill_weight_end is not None
        require(
            steps is None or moves,
            f"rl.schedule_steps={steps} is how long a weight moves, and none does; set rl.weight_end or rl.distill_weight_end, or drop it.",
        )

    @property
    def rewarded(self) -> bool:
        """Whether a reward has a say at any step."""
        return max(self.weight, self.weight_end or 0.0) > 0

    @property
    def distilled(self) -> bool:
        """Whether a teacher has a say at any step."""
        return max(self.distill_weight, self.distill_weight_end or 0.0) > 0

    def weights_at(self, step: int, total_steps: int) -> tuple[float, float]:
        """λ_rl and λ_distill at a step, counted from 0."""
        steps = self.schedule_steps or max(1, total_steps - 1)
        return (
            moving(self.weight, self.weight_end, steps).at(step),
            moving(self.distill_weight, self.distill_weight_end, steps).at(step),
        )


class RlConfig(HybridConfig, key="rl"):
    """Reinforcement learning on the same rollouts, alone or beside distillation. Off while rl.weight is 0."""

    reward: str | None = None
    """As eval.reward, which None takes."""
    advantage: Literal["grpo", "rloo"] = "grpo"
    """grpo: reward minus the mean of its prompt's samples (arXiv 2402.03300); rloo: minus the mean of the others (arXiv 2402.14740)."""
    normalize_std: bool = True
    """grpo: divide by the standard deviation of the prompt's samples; False is arXiv 2503.20783."""
    clip_range: float | None = 0.2
    """ε of the clipped ratio student / sampler, arXiv 1707.06347; None does not clip."""
    clip_high: float | None = None
    """ε above 1, where it differs from the one below (arXiv 2503.14476 uses 0.28)."""
    reference_kl: float = 0.0
    """β of a penalty −β (log p − log p_reference) in each token's advantage; the reference is the student before training: a copy
    of its weights, or, with student.lora, the student without its adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("rl.reference_kl", self.reference_kl)
        for name in ("clip_range", "clip_high"):
            value = getattr(self, name)
            ok = value is None or (math.isfinite(value) and value > 0)
            require(ok, f"rl.{name} must be a positive number, or null for no clipping, not {value}")
        require(
            self.clip_high is None or self.clip_range is not None,
            "rl.clip_high is the upper end of a clipped ratio, and rl.clip_range=null does not clip; set both or neither.",
        )

    @property
    def clip(self) -> float | tuple[float, float] | None:
        """`Hybrid.clip_range`: one ε, or a pair."""
        if self.clip_range is None or self.clip_high is None:
            return self.clip_range
        return self.clip_range, self.clip_high

    def at(self, step: int, total_steps: int, objective: Objective) -> Hybrid:
        """What the update of this step minimises."""
        rl_weight, distill_weight = self.weights_at(step, total_steps)
        return Hybrid(
            distill=objective,
            rl_weight=rl_weight,
            distill_weight=distill_weight,
            combine=self.combine,
            scale=self.scale,
            clip_range=self.clip,
        )

    def check(self, objective: Objective, *, samples_per_prompt: int) -> None:
        """Raise ConfigError for settings of other sections that a reward cannot work with."""
        if not self.rewarded:
            return
        require(
            samples_per_prompt > 1,
            f"rl.advantage={self.advantage} compares a sample with the others of its prompt, and train.samples_per_prompt=1 leaves "
            "nothing to compare with, so every advantage would be 0. Use 4 or more.",
        )
        require(
            self.reference_kl == 0 or objective.student_temperature == 1,
            f"rl.reference_kl compares log-probs at temperature 1, and objective.student_temperature is {objective.student_temperature}; "
            "set it and rollout.temperature to 1, or rl.reference_kl=0.",
        )
        if self.distilled:
            # refuses what cannot be mixed
            Hybrid(distill=objective, rl_weight=1.0, combine=self.combine, scale=self.scale)


class BaseMixtureConfig(Section, key="mixture"):
    """The kind of a mixture of teachers and its weights. Shared by the recipe and verl's `opd.mixture`."""

    kind: Literal["routing", "probability", "logit", "loss"] = "routing"
    """routing: every prompt has one teacher, which its column prompts.teacher_column names; probability: Σ w q; logit: softmax of
    Σ w log q; loss: Σ w D(S, T), a loss for each."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of every teacher by name, 1 in sum; empty is the same for all. With routing, read by balance_tokens."""

    def __post_init__(self) -> None:
        if self.weights:
            check_weights("mixture.weights", self.weights)
            require(self.reads_weights, f"mixture.weights {self._idle}")

    @property
    def reads_weights(self) -> bool:
        """Whether the weights of the teachers matter."""
        return self.kind != "routing"

    _idle: ClassVar[str] = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Use another kind, or drop it."
    )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        check_names("mixture.weights", self.weights, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        return {name: self.weights[name] if self.weights else 1.0 / len(names) for name in names}


class MixtureConfig(BaseMixtureConfig, key="mixture"):
    """How several teachers (section teachers) make one. Read where there are two or more."""

    weights_end: dict[str, float] = field(default_factory=dict)
    """The weights move to these, linearly; empty keeps them."""
    schedule_steps: int | None = None
    """Steps that the move takes; None is the whole run."""
    weights_column: str | None = None
    """Column of the prompts with weights of their own, e.g. {"math": 0.7, "code": 0.3}; a prompt without takes mixture.weights."""
    balance_tokens: bool = False
    """routing: the tokens of every teacher's prompts count as mixture.weights say in sum, however many or long the responses are."""

    _idle = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Set balance_tokens=true to weigh the teachers' tokens, "
        "or another kind."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_end:
            check_weights("mixture.weights_end", self.weights_end)
        steps = self.schedule_steps
        require(steps is None or steps >= 1, f"mixture.schedule_steps must be at least 1, not {steps}")
        require(
            steps is None or bool(self.weights_end),
            f"mixture.schedule_steps={steps} is how long the weights move, and they do not; set mixture.weights_end, or drop it.",
        )
        require(
            not self.balance_tokens or self.kind == "routing",
            f"mixture.balance_tokens is about prompts that have a teacher each, and mixture.kind={self.kind} asks all teachers about "
            "all prompts; use kind=routing, or mixture.weights.",
        )
        require(self.reads_weights or not self.weights_end, f"mixture.weights_end {self._idle}")
        require(
            self.weights_column is None or self.kind != "routing",
            "mixture.weights_column gives a prompt several teachers, and mixture.kind=routing gives it one; use kind=probability, logit "
            "or loss.",
        )

    @property
    def reads_weights(self) -> bool:
        """Whether the weights of the teachers matter."""
        return self.kind != "routing" or self.balance_tokens

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        super().check_names(names)
        check_names("mixture.weights_end", self.weights_end, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        start = super().at(step, total_steps, names)
        if not self.weights_end:
            return start
        steps = self.schedule_steps or max(1, total_steps - 1)
        return {name: moving(start[name], self.weights_end[name], steps).at(step) for name in names}


def check_not_negative(key: str, value: float | None) -> None:
    """Raise ConfigError unless the value is None, 0 or a positive number."""
    ok = value is None or (math.isfinite(value) and value >= 0)
    require(ok, f"{key} must be 0 or a positive number, not {value}")


def check_names(key: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise ConfigError unless the weights are none, or one for every name."""
    require(
        not weights or sorted(weights) == sorted(names),
        f"{key} names {', '.join(sorted(weights))}, and the teachers are {', '.join(sorted(names))}; give every teacher one weight "
        "(0 is allowed).",
    )


def check_weights(what: str, weights: Mapping[str, float]) -> None:
    """Raise ConfigError for weights that are negative or do not sum to one."""
    total = sum(weights.values())
    ok = all(math.isfinite(w) and w >= 0 for w in weights.values()) and abs(total - 1.0) <= WEIGHT_SUM_TOLERANCE
    shown = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
    require(ok, f"{what} must be ≥ 0 and sum to 1, but {{{shown}}} sums to {total:g}; divide them by their sum.")


def check_on_policy(objective: Objective, rollout: RolloutConfig) -> None:
    """Losses that look at the sampled token are right only for tokens drawn from the student, or reweighted to be."""
    sampled = f"estimator={objective.estimator}" if objective.support == "sampled" else "tail=sampled"
    if objective.support != "sampled" and objective.tail != "sampled":
        return
    reweighted = objective.estimator in ("k1", "exact")
    if objective.discount > 0 and (rollout.lmbda < 1 or rollout.temperature != objective.student_temperature):
        raise ConfigError(
            f"objective.discount={objective.discount} adds what later tokens earn, and a token's own ratio cannot reweight those to the "
            "student's distribution. Set rollout.lmbda=1 and rollout.temperature to objective.student_temperature, or discount=0."
        )
    if rollout.lmbda < 1 and (rollout.off_policy == "dataset" or not reweighted):
        raise ConfigError(
            f"objective {sampled} has the right gradient only for tokens that the student sampled, and rollout.lmbda="
            f"{rollout.lmbda} mixes in {rollout.off_policy} responses. Set rollout.lmbda=1, or use objective.support=full."
        )
    filtered = rollout.top_p < 1 or rollout.top_k > 0 or rollout.temperature != objective.student_temperature
    if filtered and not reweighted:
        raise ConfigError(
            f"objective {sampled} needs tokens drawn from the very distribution it trains, and rollout.temperature, top_p or top_k "
            "draw from another one. Set rollout.temperature=1, top_p=1, top_k=0, or use estimator=k1 (delivery=advantage), which "
            "reweights."
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        raise ConfigError(
            f"objective {sampled} cannot make up for tokens that rollout.top_p={rollout.top_p} or top_k={rollout.top_k} never draw. "
            "Set top_p=1 and top_k=0, or use objective.support=full."
        )


def check_rewarded_rollouts(objective: Objective, rollout: RolloutConfig) -> None:
    """A reward is of a whole response: no token's own ratio makes up for a response that another distribution drew."""
    drawn = {
        f"lmbda={rollout.lmbda} takes some responses from elsewhere": rollout.lmbda < 1,
        f"top_p={rollout.top_p} leaves tokens out": rollout.top_p < 1,
        f"top_k={rollout.top_k} leaves tokens out": rollout.top_k > 0,
        f"temperature={rollout.temperature} is not objective.student_temperature={objective.student_temperature}": (
            rollout.temperature != objective.student_temperature
        ),
    }
    for what, wrong in drawn.items():
        require(
            not wrong,
            f"rl.weight > 0 needs responses that the student itself drew, and rollout.{what}. Set rollout.lmbda=1, top_p=1, top_k=0, "
            "and one temperature for both.",
        )
