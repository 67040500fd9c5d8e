"""The sections that the plugin and the patch read: a recipe's keys, their own, and the rules between them. Needs no verl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import PurePath
from typing import Any, Literal

from opd.config.guard import CanaryRule, GuardConfig, StartKlRule
from opd.config.model import DType
from opd.config.rl import HybridConfig
from opd.config.sections import Section, hint_of, parse_section, suggested_keys
from opd.config.teachers import BaseMixtureConfig
from opd.errors import ConfigError, OpdError, require
from opd.integrations.verl.plugin.concept_names import CONCEPT_NAMES, LOSS_MODE, apply_concept_names
from opd.losses import Objective

PREFIX = "opd."
POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
"""verl's section that holds the settings of the policy loss `on_policy_distillation`."""
NAMES = tuple(one.name for one in CONCEPT_NAMES)
SOLE = "teacher"
"""The name of the teacher of `opd.teacher`."""
OBJECTIVE_KEYS = tuple(f.name for f in fields(Objective) if f.name not in ("reduction", "fixed_count"))
"""verl's loss_agg_mode says how tokens are averaged, for both losses alike."""


class TeacherModel(Section, key="teacher"):
    """A frozen model that the student is compared with. It has the student's vocabulary."""

    model: str = ""
    """Local folder or hub name."""
    offload: bool = False
    """Keep its shards in CPU memory between uses (FSDP2's offload policy)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class LossMixture(BaseMixtureConfig, key="mixture"):
    """The mixture of several teachers that all read every sample."""

    kind: Literal["probability", "logit", "loss"] = "probability"
    """probability: Σ w q; logit: softmax of Σ w log q; loss: Σ w D(S, T)."""


class WholeVocabulary(Section, key="objective"):
    """A divergence of whole logits. What the divergence does not read stays None."""

    divergence: Literal["reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl"] = "reverse_kl"
    beta: float | None = None
    """Weight of the teacher in the mixture of generalized_jsd and skew_reverse_kl; 0.5 if not set."""
    normalize: bool | None = None
    """Divide generalized_jsd by β(1−β); True if not set."""
    student_temperature: float = 1.0
    """The student's raw logits are divided by it; the rollout temperature has no part in the loss."""
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        self.loss()

    def loss(self) -> Objective:
        """For the row passes. Raises ObjectiveError."""
        return Objective(**{one.name: getattr(self, one.name) for one in fields(self)})  # pyright: ignore[reportArgumentType]


class LossWeights(Section, key="rl"):
    """λ_rl of the policy loss `hybrid_loss_mode`, and λ_distill."""

    weight: float = 0.0
    distill_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("distill_weight", self.distill_weight)):
            require(0 <= value < float("inf"), f"rl.{name} must be 0 or a positive number, not {value}")
        require(
            self.distill_weight > 0,
            "rl.distill_weight=0 leaves nothing to distil; use loss_mode=vanilla for reinforcement learning alone.",
        )


class LogSettings(Section, key="log"):
    """Samples in `run_dir`, the same that a recipe's run writes."""

    samples_every: int = 10
    """Keep some responses with what both models said at each token every n steps of verl's trainer."""
    samples: int = 4
    """Responses kept each time, of those that rank 0 reads."""

    def __post_init__(self) -> None:
        require(self.samples_every >= 1, f"log.samples_every must be at least 1, not {self.samples_every}")
        require(self.samples >= 0, f"log.samples must not be negative, not {self.samples}")


class _Teachers(Section):
    """One teacher or several, in either section."""

    teacher: TeacherModel | None = None
    teachers: dict[str, TeacherModel] = field(default_factory=dict)
    """Several teachers by name, in place of `teacher`."""
    trace: str | None = None
    """Folder for the token ids and losses of every micro-batch; None writes nothing."""

    def __post_init__(self) -> None:
        require(
            self.teacher is None or not self.teachers,
            "opd.teacher and opd.teachers are both set; name all teachers in opd.teachers, or drop it.",
        )

    @property
    def all_teachers(self) -> dict[str, Any]:
        """Every teacher by name; one alone is called 'teacher'."""
        return {SOLE: self.teacher} if self.teacher is not None else self.teachers


class DistillationSettings(_Teachers):
    """The settings of the policy loss: `policy_loss.opd`, with the concept's names beside it (`settings_of`)."""

    mixture: LossMixture = field(default_factory=LossMixture)
    objective: WholeVocabulary = field(default_factory=WholeVocabulary)
    rl: LossWeights = field(default_factory=LossWeights)
    hybrid_loss_mode: str = "vanilla"
    """The policy loss that rl.weight weighs, by its name in verl's registry."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, one in self.all_teachers.items():
            require(bool(one.model.strip()), f"{key_of(name)}.model is not set; give the teacher's folder or hub name.")
        self.mixture.check_names(list(self.all_teachers))
        require(
            self.hybrid_loss_mode != LOSS_MODE,
            "opd.hybrid_loss_mode is the policy loss beside distillation; name another, for example vanilla.",
        )

    def __str__(self) -> str:
        """The line of the log that says what is trained."""
        mixture = {"mixture": self.mixture.kind, "mixture_weights": self.mixture.weights}
        weights = {"rl_weight": self.rl.weight, "distill_weight": self.rl.distill_weight}
        more = {"hybrid_loss_mode": self.hybrid_loss_mode, "trace": self.trace}
        told = {"teachers": self.all_teachers, **mixture, **vars(self.objective), **weights, **more}
        return f"DistillationSettings({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    @property
    def trains_rl(self) -> bool:
        """A policy loss is trained beside the distillation."""
        return self.rl.weight > 0

    def shares(self, teachers: int) -> list[float]:
        """The weight of each of so many teachers, in their order."""
        weights = self.mixture.weights
        return [weights[name] for name in self.all_teachers] if weights else [1.0 / max(1, teachers)] * teachers


class TeacherSettings(TeacherModel, key="teacher"):
    """A teacher of the plugin, which may be the student itself."""

    source: Literal["model", "adapter_off"] = "model"
    """adapter_off: the student's own base, which is the student with its LoRA adapter off; `model` is not read."""
    dtype: DType = "auto"
    """Of its weights and its forward pass; auto is what the student computes in (fsdp_config.mixed_precision)."""
    attn_implementation: str | None = None
    """None is the student's."""

    @property
    def is_student(self) -> bool:
        """True where no model of its own is loaded."""
        return self.source == "adapter_off"


class MixtureSettings(BaseMixtureConfig, key="mixture"):
    """The mixture of several teachers."""

    kind: Literal["routing", "probability", "logit", "loss"] = "probability"
    """probability: Σ w q; logit: softmax of Σ w log q; loss: Σ w D(S, T); routing: every sample has one teacher, which its field
    prompts.teacher_column names."""


class PromptsSettings(Section, key="prompts"):
    """The columns of verl's data files that opd reads."""

    teacher_column: str = "data_source"
    """With mixture.kind=routing: the field of a sample that names its teacher."""


class DriverGuardConfig(GuardConfig, key="guard"):
    """The rules of a recipe that read metrics of a step."""

    canary: CanaryRule = field(default_factory=lambda: CanaryRule(action="off"))
    """Off: sanity_check_every looks at the teacher in verl."""
    start_kl: StartKlRule = field(default_factory=StartKlRule)
    """Off: verl measures the KL to its reference model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.canary.action == "off",
            f"opd.guard.canary.action={self.canary.action}: the driver has no teacher to look at, and in verl opd.sanity_check_every does that "
            "in the workers. Set it, and drop opd.guard.canary.",
        )
        require(
            self.start_kl.action == "off",
            f"opd.guard.start_kl.action={self.start_kl.action}: the driver has no student to measure, and verl records the KL to its reference "
            "model with actor_rollout_ref.actor.use_kl_loss=True. Drop opd.guard.start_kl.",
        )


class Settings(_Teachers):
    """The section `opd`, as `+opd=default` and its overrides make it."""

    teacher: TeacherSettings | None = None
    teachers: dict[str, TeacherSettings] = field(default_factory=dict)  # pyright: ignore[reportIncompatibleVariableOverride]
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    prompts: PromptsSettings = field(default_factory=PromptsSettings)
    objective: Objective = field(default_factory=Objective)
    rl: HybridConfig = field(default_factory=HybridConfig)
    """rl.weight is the weight of verl's own loss (policy, entropy bonus, KL to the reference); 0 computes none of it. With
    rl.distill_weight=0 no teacher is loaded. Schedules count the steps of verl's trainer."""
    placement: Literal["actor", "pool", "hidden"] = "actor"
    """The place of the teacher: in the actor's workers, or in servers of verl's, which send log-probs of a few tokens (+opd=pool) or
    hidden states (+opd=hidden)."""
    run_dir: str | None = None
    """Folder for metrics and samples of the run, which opd report reads; None writes nothing. An absolute path that rank 0 can write to."""
    log: LogSettings = field(default_factory=LogSettings)
    guard: DriverGuardConfig = field(default_factory=DriverGuardConfig)
    """Rules over the metrics of each step, which the trainers of `guarded_trainer` look at on the driver."""
    sanity_check_every: int = 100
    """Run the sanity check of the teacher's scores every n updates, the first included; 0 switches it off."""
    try_verl: bool = False
    """Start although verl has moved something that opd relies on."""

    def __post_init__(self) -> None:
        checked = self.sanity_check_every
        require(checked >= 0, f"opd.sanity_check_every={checked} must be ≥ 0; 0 switches the check off.")
        super().__post_init__()
        for name, rule in self.guard.rules.items():
            require(
                rule.action != "drop",
                f"opd.guard.{name}.action=drop: verl counts the tokens of a mini-batch before opd sees it, and its own loss reads all of "
                "them, so that opd leaves no response out. Use warn or stop.",
            )
        require(
            self.run_dir is None or PurePath(self.run_dir).is_absolute(),
            f"opd.run_dir='{self.run_dir}' is no absolute path, and a worker of Ray runs in a folder of its own; write it from the root.",
        )
        require(bool(self.all_teachers), "opd.teacher.model is not set; give the teacher's folder or hub name.")
        for name, one in self.all_teachers.items():
            require(
                one.is_student != bool(one.model.strip()),
                f"{key_of(name)} needs a model, or source=adapter_off for the student's own base, and not both; give the teacher's "
                "folder or hub name.",
            )
        if len(self.all_teachers) > 1:
            self.mixture.check_names(list(self.all_teachers))
        else:
            require(
                self.mixture == MixtureSettings(),
                "opd.teachers has one teacher, so there is nothing to mix; drop opd.mixture.kind and opd.mixture.weights.",
            )
        require(
            self.rl.scale == "none" or (self.rl.rewarded and self.rl.distilled),
            "opd.rl.scale=match brings two terms to one size, and one of them has weight 0; set opd.rl.weight and opd.rl.distill_weight, "
            "or opd.rl.scale=none.",
        )
        one = self.objective
        is_plain = one.support == "sampled" and one.delivery == "advantage" and one.baseline == "none"
        require(
            not self.adds_advantages or (is_plain and not one.discount and not one.clip_range),
            "opd.rl.combine=advantages adds log q − log p of the sampled token to verl's advantage, and verl's policy loss does the rest; "
            "set opd.objective.support=sampled opd.objective.estimator=k1 opd.objective.delivery=advantage, without baseline, discount and "
            "clip_range, or use opd.rl.combine=losses.",
        )

    @property
    def is_served(self) -> bool:
        """True where verl's teacher servers run."""
        return self.placement != "actor"

    @property
    def adds_advantages(self) -> bool:
        """True where the distillation is a term of verl's advantages in place of a loss."""
        return self.rl.combine == "advantages" and self.rl.rewarded and self.rl.distilled

    def shares(self) -> dict[str, float]:
        """The weight of each teacher in the mixture."""
        return self.mixture.at(0, 1, list(self.all_teachers))

    def describe(self) -> str:
        """The resolved objective in one line: the divergence, the weights, and every setting that is not its default."""
        weight, distill_weight = (
            f"{start:g}" if end is None else f"{start:g}→{end:g}"
            for start, end in (
                (self.rl.weight, self.rl.weight_end),
                (self.rl.distill_weight, self.rl.distill_weight_end),
            )
        )
        if not self.rl.distilled:
            return f"rl.distill_weight=0: verl's own loss times rl.weight={weight}, no teacher"
        parts = [self.objective.divergence]
        parts += [f"{key}={value}" for key, value in changed(self.objective).items() if key != "divergence"]
        parts += ["rl.combine=advantages"] if self.adds_advantages else []
        parts += [f"rl.scale={self.rl.scale}"] if self.rl.scale != "none" else []
        parts += [f"rl.distill_weight={distill_weight}", f"rl.weight={weight}"]
        if len(self.all_teachers) > 1:
            column = f" by {self.prompts.teacher_column}" if self.mixture.kind == "routing" else ""
            parts.append(f"mixture.kind={self.mixture.kind}{column}")
        return f"{' '.join(parts)}, {', '.join(map(self._describe_teacher, self.all_teachers))} in the {self.placement}"

    def _describe_teacher(self, name: str) -> str:
        one = self.all_teachers[name]
        model = "the student's base" if one.is_student else f"'{one.model}'"
        weighted = len(self.all_teachers) > 1 and self.mixture.reads_weights
        return f"{name} {model}" + (f" × {self.shares()[name]:g}" if weighted else "")


def key_of(name: str) -> str:
    """The section of a teacher, as it is written on verl's command line."""
    return "opd.teacher" if name == SOLE else f"opd.teachers.{name}"


def changed(objective: Objective) -> dict[str, Any]:
    """The settings of an objective that differ from the default one."""
    return {key: value for key, value in objective.changed().items() if key in OBJECTIVE_KEYS}


def parse(section: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
    """The settings, and a line for every name of the concept: to what it was mapped.

    Raises ConfigError or ObjectiveError that names the key as it is written on verl's command line.
    """
    tree, notes = apply_concept_names(section, _defaults(), PREFIX)
    teacher, several, objective = tree.get("teacher"), tree.get("teachers"), tree.get("objective")
    if isinstance(teacher, dict):
        # The config group spells the section out, with model: null.
        teacher = {key: value for key, value in teacher.items() if not (key == "model" and value is None)}
        is_default = not teacher.get("model") and teacher.get("source", "model") == "model"
        is_unknown = any(hint_of(TeacherSettings, key) is None for key in teacher)
        tree["teacher"] = None if is_default and not is_unknown else teacher
    if several is not None and not isinstance(several, Mapping):
        raise ConfigError(
            f"opd.teachers is a section, not {several!r}; name each teacher: +opd.teachers.NAME.model=PATH."
        )
    for key in ("reduction", "fixed_count"):
        if isinstance(objective, dict) and key in objective:
            raise ConfigError(f"opd.objective.{key} is verl's to say; set actor_rollout_ref.actor.loss_agg_mode.")
    return parse_section(Settings, tree, PREFIX), notes


def settings_of(policy_loss: Any) -> DistillationSettings:
    """The settings in verl's PolicyLossConfig, or in a mapping of the same keys; None gives the defaults. Raises ConfigError."""
    if policy_loss is None:
        return DistillationSettings()
    given, notes = _set_keys(policy_loss.get("opd", None) or {}), ()
    beside = {name: policy_loss.get(name, None) for name in NAMES}
    try:
        for name in NAMES:
            require(name not in given, f"opd.{name}: this name stands beside opd, not in it; move it there.")
        tree, notes = apply_concept_names({**given, **beside}, {})
        return parse_section(DistillationSettings, tree, f"{POLICY_LOSS}.opd.")
    except OpdError as error:
        place = "" if POLICY_LOSS in str(error) else f"{POLICY_LOSS}: "
        raise ConfigError(" ".join([f"{place}{error}", *notes])) from None


def _set_keys(given: Any) -> Any:
    """A section without keys that are null; a section `teacher` whose keys all are is none."""
    if not isinstance(given, Mapping):
        return given
    tree = {str(key): _set_keys(value) for key, value in given.items() if value is not None}
    return {key: value for key, value in tree.items() if (key, value) != (SOLE, {})}


def _defaults() -> dict[str, Any]:
    """The values that the config group spells out, of the keys that a name of the concept may set."""
    groups = {"objective": Objective(), "rl": HybridConfig()}
    return {f"{group}.{f.name}": getattr(one, f.name) for group, one in groups.items() for f in fields(one)}  # pyright: ignore[reportArgumentType]


def suggestion(key: str) -> str:
    """The keys that an unknown key below `opd.` may stand for, quoted, or nothing."""
    return " or ".join(map(repr, suggested_keys(Settings, key, PREFIX)))


def may_be_added(key: str) -> bool:
    """True for a key below `opd.` that the config group lacks because it holds the name of a teacher."""
    section, _, rest = key.removeprefix(PREFIX).partition(".")
    if section == "teachers":
        return hint_of(Settings, f"{section}.{rest}") is not None
    return key.startswith("opd.mixture.weights.")
