"""The `opd:` section of a verl config: parsed, mapped from its older names, and refused where it cannot work. Needs no verl."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from opd.errors import ConfigError, ObjectiveError
from opd.losses import Objective, linear_schedule

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The frozen model that the student is compared with."""

    model_path: str = ""
    """Local folder or hub name. It has the student's vocabulary."""
    adapter_off: bool = False
    """The teacher is the student's own base: the student with its LoRA adapter off. No other model is loaded."""
    weight: float | None = None
    """In a mixture of several teachers; the weights sum to 1. None is equal shares."""
    dtype: DType = "auto"
    """Of its weights and its forward pass; auto is what the student computes in (fsdp_config.mixed_precision)."""
    offload: bool = False
    """Keep its shards in CPU memory between uses (FSDP2's offload policy)."""
    attn_implementation: str | None = None
    """None is the student's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `+opd=default` and its overrides come to."""

    teachers: dict[str, TeacherSettings]
    """By name; `opd.teacher` alone is the one named 'teacher'."""
    objective: Objective = field(default_factory=Objective)
    placement: Literal["actor", "pool", "hidden"] = "actor"
    """Where the teacher runs: in the actor's workers, on the very micro-batch that the student is trained on; or in servers of
    verl's, which send the log-probs of a few tokens (+opd=pool) or hidden states (+opd=hidden)."""
    lambda_rl: float = 0.0
    """Weight of verl's own loss (policy, entropy bonus, KL to the reference)."""
    lambda_distill: float = 1.0
    """Weight of the distillation loss; 0 is stock verl, and no teacher is loaded."""
    lambda_rl_end: float | None = None
    """λ_rl moves from `lambda_rl` to this, linearly; None keeps it."""
    lambda_distill_end: float | None = None
    """λ_distill moves from `lambda_distill` to this, linearly; None keeps it."""
    lambda_steps: int | None = None
    """Steps of verl's trainer that both moves take; None is the whole run."""

    scale: Literal["none", "match"] = "none"
    """With both weights > 0: match divides verl's loss by the standard deviation of its advantages over the mini-batch, and the
    distillation by that of its own per-token term, before they are weighed: one more forward pass of both models."""
    hybrid: Literal["losses", "advantages"] = "losses"
    """With both weights > 0: add the two losses, or add the two advantages of each token and let verl's policy loss clip the sum."""
    mixture: Literal["probability", "logit", "loss", "routing"] = "probability"
    """What several teachers are together: q = Σ w q_i, log q ∝ Σ w log q_i, Σ w D(student, q_i), or one teacher per sample."""
    teacher_key: str = "data_source"
    """With mixture=routing: the field of a sample that names its teacher."""
    canary_every: int = 100
    """Updates between looks at whether the teacher's scores can be meant; the first update is always looked at. 0 never looks."""
    try_verl: bool = False
    """Start although verl has moved something that opd holds on to; without it such a verl is refused with what has moved."""
    trace: str | None = None
    """Folder for what was trained on: token ids and losses of every micro-batch, as safetensors. None writes nothing."""

    def __post_init__(self) -> None:
        for name in ("lambda_rl", "lambda_distill", "lambda_rl_end", "lambda_distill_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"opd.{name}={value} must be a finite number ≥ 0; a negative weight would push away from the goal."
                )
        self._check_weights()
        if self.canary_every < 0:
            raise ConfigError(f"opd.canary_every={self.canary_every} must be ≥ 0; 0 switches the check off.")
        self._check_teachers()
        self._check_hybrid()

    def _check_weights(self) -> None:
        if self.lambda_rl == 0 and self.lambda_distill == 0:
            raise ConfigError("opd.lambda_rl and opd.lambda_distill are both 0: nothing is left to train on; set one.")
        if self.lambda_rl_end is None and self.lambda_distill_end is None:
            if self.lambda_steps is not None:
                raise ConfigError(
                    f"opd.lambda_steps={self.lambda_steps} is how long a weight moves, and none does; set opd.lambda_rl_end or "
                    "opd.lambda_distill_end, or drop it."
                )
        elif self.lambda_steps is not None and self.lambda_steps < 1:
            raise ConfigError(f"opd.lambda_steps={self.lambda_steps} must be at least 1.")
        elif self.weights(1, 1) == (0.0, 0.0):
            raise ConfigError(
                "opd.lambda_rl and opd.lambda_distill are both 0 at the end: nothing is left to train on; keep one."
            )
        if self.scale == "match" and not (self.rewards and self.distils):
            raise ConfigError(
                "opd.scale=match brings two terms to one size, and one of them has weight 0; set opd.lambda_rl and opd.lambda_distill, or "
                "opd.scale=none."
            )

    def _check_hybrid(self) -> None:
        if self.hybrid == "losses" or not (self.rewards and self.distils):
            return
        one = self.objective
        if (
            one.support != "sampled"
            or one.delivery != "advantage"
            or one.discount
            or one.baseline != "none"
            or one.clip_range
        ):
            raise ConfigError(
                "opd.hybrid=advantages adds log q − log p of the sampled token to verl's advantage, and verl's policy loss does the rest; "
                "set opd.support=sampled opd.estimator=k1 opd.delivery=advantage, without baseline, discount and clip_range, or use "
                "opd.hybrid=losses."
            )

    def _check_teachers(self) -> None:
        if not self.teachers:
            raise ConfigError("opd.teacher.model_path is not set; give the teacher's folder or hub name.")
        for name, one in self.teachers.items():
            key = "opd.teacher" if name == SOLE else f"opd.teachers.{name}"
            if one.adapter_off == bool(one.model_path.strip()):
                raise ConfigError(
                    f"{key} needs a model_path, or adapter_off=true for the student's own base, and not both; give the teacher's folder "
                    "or hub name."
                )
        given = [one.weight for one in self.teachers.values() if one.weight is not None]
        if len(self.teachers) == 1:
            if given or self.mixture != "probability":
                raise ConfigError("opd.teachers has one teacher, so there is nothing to mix; drop weight and mixture.")
        elif self.mixture == "routing":
            if given:
                raise ConfigError("opd.mixture=routing gives each sample one teacher whole; drop the weights.")
        elif given and (len(given) < len(self.teachers) or min(given) < 0 or abs(sum(given) - 1.0) > 1e-6):
            told = ", ".join(f"{name} {one.weight}" for name, one in self.teachers.items())
            raise ConfigError(
                f"the weights of opd.teachers are {told}; give every teacher one ≥ 0, with a sum of 1, or none a weight."
            )

    @property
    def distils(self) -> bool:
        """Whether a teacher has a say at any step."""
        return max(self.lambda_distill, self.lambda_distill_end or 0.0) > 0

    @property
    def rewards(self) -> bool:
        """Whether verl's own loss has a say at any step."""
        return max(self.lambda_rl, self.lambda_rl_end or 0.0) > 0

    def weights(self, step: int, steps: int) -> tuple[float, float]:
        """λ_rl and λ_distill at a step, from 0, of a run of so many."""
        over = self.lambda_steps or max(1, steps - 1)
        return (
            linear_schedule(self.lambda_rl, self.lambda_rl_end, over).at(step),
            linear_schedule(self.lambda_distill, self.lambda_distill_end, over).at(step),
        )

    @property
    def served(self) -> bool:
        """Whether verl's teacher servers run."""
        return self.placement != "actor"

    def describe(self) -> str:
        """The resolved objective in one line: the divergence, and every setting that is not its default."""
        if not self.distils:
            return f"lambda_distill=0: verl's own loss times lambda_rl={_moves(self.lambda_rl, self.lambda_rl_end)}, no teacher"
        told = [f"{key}={value}" for key, value in changed(self.objective).items() if key != "divergence"]
        if self.hybrid == "advantages" and self.rewards:
            told.append("hybrid=advantages")
        if self.scale != "none":
            told.append(f"scale={self.scale}")
        parts = [
            self.objective.divergence,
            *told,
            f"lambda_distill={_moves(self.lambda_distill, self.lambda_distill_end)}",
            f"lambda_rl={_moves(self.lambda_rl, self.lambda_rl_end)}",
        ]
        if len(self.teachers) > 1:
            parts.append(f"mixture={self.mixture}" + (f" by {self.teacher_key}" if self.mixture == "routing" else ""))
        return f"{' '.join(parts)}, {', '.join(self._told(name) for name in self.teachers)} in the {self.placement}"

    def _told(self, name: str) -> str:
        one = self.teachers[name]
        who = "the student's base" if one.adapter_off else f"'{one.model_path}'"
        share = "" if len(self.teachers) == 1 or self.mixture == "routing" else f" × {self.share(name):g}"
        return f"{'teacher' if name == SOLE else name} {who}{share}"

    def share(self, name: str) -> float:
        """A teacher's weight in the mixture."""
        weight = self.teachers[name].weight
        return 1.0 / len(self.teachers) if weight is None else weight


def _moves(start: float, end: float | None) -> str:
    return f"{start:g}" if end is None else f"{start:g}→{end:g}"


SOLE = "teacher"
"""The name of the teacher of `opd.teacher`."""
OBJECTIVE_KEYS = tuple(f.name for f in dataclasses.fields(Objective) if f.name not in ("reduction", "fixed_count"))
"""verl's loss_agg_mode says how tokens are averaged, for both losses alike."""
OWN_KEYS = ("teacher", *(f.name for f in dataclasses.fields(Settings) if f.name != "objective"))

OLDER_NAMES = {
    "distillation_type": ("divergence",),
    "distillation_temperature": ("student_temperature", "teacher_temperature"),
    "distillation_beta": ("beta",),
    "hybrid_lambda_rl": ("lambda_rl",),
    "hybrid_lambda_distill": ("lambda_distill",),
}
OLDER_TYPES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "gkd": "skew_reverse_kl"}
GKD = (
    "gkd is KL(student ‖ beta·teacher + (1−beta)·student), which is divergence=skew_reverse_kl; the divergence of the GKD paper "
    "(arXiv 2306.13649) is divergence=generalized_jsd"
)


def parse(section: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
    """The settings, and a line for every older name: to what it was mapped.

    Raises ConfigError or ObjectiveError that names the key as it is written on verl's command line.
    """
    plain = {str(key): value for key, value in section.items()}
    _refuse_unknown(plain, (*OWN_KEYS, *OBJECTIVE_KEYS, *OLDER_NAMES), "opd.")
    plain, notes = _map_older_names(plain)
    teachers = _teachers(plain.pop("teacher", None), plain.pop("teachers", None))
    own = {key: plain.pop(key) for key in OWN_KEYS if key in plain}
    if plain.get("always_include") is not None:
        plain["always_include"] = tuple(_listed(plain["always_include"]))
    objective = _typed(Objective, plain, "opd.")
    settings = _typed(Settings, {**own, "teachers": teachers, "objective": objective}, "opd.")  # fmt: skip
    return settings, notes


def _teachers(sole: Any, several: Any) -> dict[str, TeacherSettings]:
    """Those of opd.teachers, or the one of opd.teacher."""
    if several:
        if not isinstance(several, Mapping):
            raise ConfigError(
                f"opd.teachers is a section, not {several!r}; name each teacher: +opd.teachers.NAME.model_path=PATH."
            )
        if isinstance(sole, Mapping) and (sole.get("model_path") or sole.get("adapter_off")):
            raise ConfigError(
                "opd.teacher and opd.teachers are both set; name all teachers in opd.teachers, or drop it."
            )
        return {str(name): _teacher(one, f"opd.teachers.{name}") for name, one in several.items()}
    found = _teacher(sole or {}, "opd.teacher")
    if not found.model_path and not found.adapter_off:
        raise ConfigError("opd.teacher.model_path is not set; give the teacher's folder or hub name.")
    return {SOLE: found}


def _teacher(section: Any, key: str) -> TeacherSettings:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key} is a section, not {section!r}; set its keys, e.g. {key}.model_path=PATH.")
    _refuse_unknown(section, [f.name for f in dataclasses.fields(TeacherSettings)], f"{key}.")
    given = {str(name): value for name, value in section.items() if not (name == "model_path" and value is None)}
    return _typed(TeacherSettings, given, f"{key}.")


def changed(objective: Objective) -> dict[str, Any]:
    """What differs from the default objective."""
    return {key: value for key, value in objective.changed().items() if key in OBJECTIVE_KEYS}


def _map_older_names(section: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    defaults = {
        **dataclasses.asdict(Objective()),
        "lambda_rl": Settings.lambda_rl,
        "lambda_distill": Settings.lambda_distill,
    }
    mapped = {key: value for key, value in section.items() if key not in OLDER_NAMES}
    notes = []
    for older, names in OLDER_NAMES.items():
        value = section.get(older)
        if value is None:
            continue
        if older == "distillation_type" and value not in OLDER_TYPES:
            raise ConfigError(
                f"opd.distillation_type={value!r} is not one of {', '.join(OLDER_TYPES)}; opd.divergence has more to choose from."
            )
        new = OLDER_TYPES[value] if older == "distillation_type" else value
        for name in names:
            given = section.get(name, defaults[name])
            if given not in (defaults[name], new):
                raise ConfigError(
                    f"opd.{older}={value} means opd.{name}={new}, but opd.{name}={given} is set too; drop one of them."
                )
            mapped[name] = new
        said = ", ".join(f"{name}={new}" for name in names)
        notes.append(f"{older}={value} was read as {said}" + (f": {GKD}." if value == "gkd" else "."))
    return mapped, tuple(notes)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _refuse_unknown(section: Mapping[str, Any], names: Iterable[str], prefix: str) -> None:
    names = tuple(names)
    for key in section:
        if key not in names:
            near = meant(f"{prefix}{key}")
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"Unknown key '{prefix}{key}'.{hint} Keys: {', '.join(names)}.")


def meant(key: str) -> str:
    """The keys that may be meant by one below `opd.` that is none: those that hold the word, else the one spelt most like it."""
    fields = [f.name for f in dataclasses.fields(TeacherSettings)]
    section, _, word = key.rpartition(".")
    if section == "opd":
        names = [*OWN_KEYS, *OBJECTIVE_KEYS, *(f"teacher.{name}" for name in fields)]
    else:
        names = fields
    near = [name for name in names if f"_{word}_" in f"_{name.rpartition('.')[2]}_"]
    near = near or difflib.get_close_matches(word, names, n=1)
    return " or ".join(f"'{section}.{name}'" for name in near)


def may_be_added(key: str) -> bool:
    """Whether a key below `opd.` that the config group lacks is one of a teacher with a name."""
    parts = key.split(".")
    fields = {f.name for f in dataclasses.fields(TeacherSettings)}
    return parts[:2] == ["opd", "teachers"] and (len(parts) == 3 or (len(parts) == 4 and parts[3] in fields))


def _typed(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass, with types checked; numbers are not booleans."""
    for item in dataclasses.fields(kind):
        value = values.get(item.name)
        if isinstance(value, bool) and ("float" in str(item.type) or "int" in str(item.type)):
            raise ConfigError(f"{prefix}{item.name} cannot be {str(value).lower()}: it is a number; write one.")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ObjectiveError):
            raise ObjectiveError(f"opd: {cause}") from None
        if isinstance(cause, ConfigError):
            raise ConfigError(str(cause)) from None
        if first["loc"] == ("tail",) and first["input"] == "ignore":
            raise ObjectiveError(
                "opd.tail=ignore drops the mass outside the support, and its optimum pushes mass there; use tail=bucket."
            ) from None
        key = prefix + ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key} cannot be {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None
