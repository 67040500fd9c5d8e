"""The settings of verl's policy loss `on_policy_distillation`, and the refusal of configs that cannot work.

They stand in `actor_rollout_ref.actor.policy_loss`: the recipe's keys under `opd`, and the concept's names beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from opd.errors import ConfigError
from opd.integrations.verl.plugin.concept_names import CONCEPT_NAMES, LOSS_MODE, apply_concept_names
from opd.losses import Objective

PREFIX = "actor/distillation/"
"""Prefix of the metrics."""
SECTION = "actor_rollout_ref.actor.policy_loss"
NAMES = tuple(one.name for one in CONCEPT_NAMES)
DIVERGENCES = ("reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl")
READ_BETA = ("generalized_jsd", "skew_reverse_kl")
MIXTURES = ("probability", "logit", "loss")
STRATEGIES = ("fsdp", "fsdp2")
TREE = {
    "teacher": ("model", "offload", "trust_remote_code"),
    "teachers": (),
    "mixture": ("kind", "weights"),
    "objective": ("divergence", "beta", "normalize", "student_temperature", "teacher_temperature"),
    "rl": ("weight", "distill_weight"),
}
"""The sections of `policy_loss.opd` and their keys; in `teachers` each name has those of `teacher`."""
SOLE = "teacher"
"""The name of the teacher of `opd.teacher`."""


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """A frozen teacher, with the student's vocabulary."""

    model: str
    """Local folder or hub name."""
    offload: bool = False
    """Keep its shards in CPU memory between uses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """One run's distillation. Raises ConfigError for values that cannot work, and names their keys."""

    teachers: Mapping[str, TeacherModel] = field(default_factory=dict)
    mixture: str = "probability"
    """Of several teachers: q = Σ w q_i, log q ∝ Σ w log q_i (logit), or Σ w D(student, q_i) (loss)."""
    mixture_weights: Mapping[str, float] = field(default_factory=dict)
    """By teacher, ≥ 0 and 1 in sum; empty is equal shares."""
    divergence: str = "reverse_kl"
    beta: float = 0.5
    normalize: bool = True
    student_temperature: float = 1.0
    """The student's raw logits are divided by it; the rollout temperature has no part in the loss."""
    teacher_temperature: float = 1.0
    rl_weight: float = 0.0
    distill_weight: float = 1.0
    hybrid_loss_mode: str = "vanilla"
    """The policy loss that rl_weight weighs, by its name in verl's registry."""
    trace: str | None = None
    """Folder for token ids and losses of every micro-batch; None writes nothing."""

    def __post_init__(self) -> None:
        for complaint in (*self._wrong_objective(), *self._wrong_weights(), *self._wrong_mixture()):
            raise ConfigError(f"{SECTION}: {complaint}")

    def _wrong_objective(self) -> Iterator[str]:
        if self.divergence not in DIVERGENCES:
            yield f"{_key('objective.divergence')}={self.divergence!r} is not known; use one of {', '.join(DIVERGENCES)}."
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                yield f"{_key(f'objective.{name}')}={value} must be a finite number > 0; 1.0 leaves the logits as they are."
        if not (_is_number(self.beta) and 0.0 <= self.beta <= 1.0):
            yield f"{_key('objective.beta')}={self.beta} must be between 0 (student) and 1 (teacher): it is a mixture."
        if self.divergence == "skew_reverse_kl" and self.beta == 0:
            yield f"{_key('objective.beta')}=0 with gkd is KL(student ‖ student), identically 0; 1 is reverse KL."

    def _wrong_weights(self) -> Iterator[str]:
        for name, value in (("rl.weight", self.rl_weight), ("rl.distill_weight", self.distill_weight)):
            if not (_is_number(value) and value >= 0):
                yield f"{_key(name)}={value} must be a finite number ≥ 0; a negative weight would push away from the goal."
        if self.distill_weight == 0:
            yield (
                f"{_key('rl.distill_weight')}=0 leaves nothing to distil; use loss_mode=vanilla for reinforcement learning alone."
            )
        if self.hybrid_loss_mode == LOSS_MODE:
            yield "opd.hybrid_loss_mode is the policy loss beside distillation; name another, for example vanilla."

    def _wrong_mixture(self) -> Iterator[str]:
        if self.mixture not in MIXTURES:
            yield f"opd.mixture.kind={self.mixture!r} is not one of {', '.join(MIXTURES)}."
        names, weights = sorted(self.teachers), self.mixture_weights
        if weights and not (
            sorted(weights) == names
            and all(_is_number(weight) and weight >= 0 for weight in weights.values())
            and abs(sum(weights.values()) - 1.0) <= 1e-6
        ):
            yield f"opd.mixture.weights={dict(weights)}: give each of the {len(names)} teachers ({', '.join(names)}) one ≥ 0, with a sum of 1."

    @property
    def trains_rl(self) -> bool:
        """A policy loss is trained beside the distillation."""
        return self.rl_weight > 0

    def objective(self) -> Objective:
        """The divergence, for the row passes."""
        shape = {"beta": self.beta} if self.divergence in READ_BETA else {}
        if self.divergence == "generalized_jsd":
            shape["normalize"] = self.normalize
        return Objective(
            divergence=self.divergence,  # pyright: ignore[reportArgumentType]
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            **shape,  # pyright: ignore[reportArgumentType]
        )

    def shares(self, teachers: int) -> Sequence[float]:
        """The weight of each of so many teachers, in their order."""
        if self.mixture_weights:
            return [self.mixture_weights[name] for name in self.teachers]
        return [1.0 / max(1, teachers)] * teachers


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _key(recipe: str) -> str:
    """A key as both spellings have it."""
    names = [one.name for one in CONCEPT_NAMES if recipe in one.keys]
    return f"opd.{recipe}" + (f" ({names[0]})" if names else "")


def settings_of(policy_loss: Any) -> DistillationSettings:
    """The settings in verl's PolicyLossConfig, or in a mapping of the same keys; None gives the defaults. Raises ConfigError."""
    if policy_loss is None:
        return DistillationSettings()
    given = _section(policy_loss.get("opd", None) or {}, "opd", (*TREE, "hybrid_loss_mode", "trace"))
    for name in NAMES:
        if name in given:
            raise ConfigError(f"{SECTION}.opd.{name}: this name stands beside opd, in {SECTION}; move it there.")
    beside = {name: policy_loss.get(name, None) for name in NAMES}
    try:
        merged, _ = apply_concept_names({**given, **beside}, {})
    except ConfigError as error:
        raise ConfigError(f"{SECTION}: {error}") from None
    values = {name: merged[name] for name in ("hybrid_loss_mode", "trace") if name in merged}
    teachers = _teachers(merged.get("teacher", {}), merged.get("teachers", {}))
    mixture, rl = (_section(merged.get(name, {}), f"opd.{name}", TREE[name]) for name in ("mixture", "rl"))
    objective = _section(merged.get("objective", {}), "opd.objective", TREE["objective"])
    renamed = {"kind": "mixture", "weights": "mixture_weights", "weight": "rl_weight"}
    values |= {renamed.get(name, name): value for part in (mixture, rl, objective) for name, value in part.items()}
    if not isinstance(values.get("mixture_weights", {}), Mapping):
        raise ConfigError(
            f"{SECTION}.opd.mixture.weights has a weight for each teacher by name, e.g. {{math: 0.7, code: 0.3}}."
        )
    return DistillationSettings(teachers=teachers, **values)


def _section(given: Any, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """The keys that have a value. Raises ConfigError for keys that nothing reads."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{SECTION}.{name} is a section with the keys {', '.join(keys)}, not {given!r}.")
    for key in given:
        if keys and key not in keys:
            raise ConfigError(f"{SECTION}.{name}.{key} is read by nothing; the keys are {', '.join(keys)}.")
    return {str(key): value for key, value in given.items() if value is not None}


def _teachers(sole: Any, several: Any) -> dict[str, TeacherModel]:
    found = {}
    for name, one in _section(several, "opd.teachers", ()).items():
        found[name] = _section(one, f"opd.teachers.{name}", TREE["teacher"])
    given = _section(sole, "opd.teacher", TREE["teacher"])
    if "model" in given:
        if found:
            raise ConfigError(
                f"{SECTION}.opd.teacher and opd.teachers are both set; name all teachers in opd.teachers."
            )
        found = {SOLE: given}
    for name, one in found.items():
        if not one.get("model"):
            raise ConfigError(f"{SECTION}.opd.teachers.{name}.model is not set; give the teacher's folder or hub name.")
    return {name: TeacherModel(**one) for name, one in found.items()}


def check_config(actor: Any) -> None:
    """Refuse, as a ConfigError, an actor config that cannot work. verl's ActorConfig calls it, on the driver and in every worker."""
    settings = settings_of(actor.policy_loss)
    if actor.strategy not in STRATEGIES:
        raise ConfigError(
            f"loss_mode={LOSS_MODE} with actor.strategy={actor.strategy}: the hook that hands logits to the loss is in verl's FSDP engine "
            f"only; use one of {', '.join(STRATEGIES)}."
        )
    if not settings.teachers:
        raise ConfigError(f"{SECTION}.opd.teacher.model is not set; give the teacher's folder or hub name.")
    engine = actor.get("fsdp_config", None)
    if max(actor.get("ulysses_sequence_parallel_size", 1), getattr(engine, "ulysses_sequence_parallel_size", 1)) > 1:
        raise ConfigError(
            f"loss_mode={LOSS_MODE} with sequence parallelism: teacher and student logits would be shards of a sequence; set "
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1."
        )
    if getattr(engine, "pad_to_length", False):
        raise ConfigError(f"loss_mode={LOSS_MODE} with fsdp_config.pad_to_length: switch pad_to_length off.")
    if actor.get("use_fused_kernels", False):
        raise ConfigError(
            f"loss_mode={LOSS_MODE} needs logits, and fused kernels make none; set actor_rollout_ref.model.use_fused_kernels=False."
        )
    if not settings.trains_rl and (actor.entropy_coeff or actor.use_kl_loss):
        raise ConfigError(
            f"entropy_coeff and use_kl_loss belong to the policy loss, which {_key('rl.weight')}=0 leaves out; set {SECTION}.opd.rl.weight "
            "above 0, or entropy_coeff=0 use_kl_loss=False."
        )
