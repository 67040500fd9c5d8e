"""The teachers of a run: loaded or given, checked against the student, and joined into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from opd.config import Config, RolloutConfig, TeacherConfig
from opd.doctor.renderers import make_renderer
from opd.errors import ConfigError, ObjectiveError
from opd.models import resolve_device, vocabulary_rows
from opd.ranks import ALONE, Ranks
from opd.reporting.loading import Loading
from opd.samplers.base import AdjustableSampler
from opd.samplers.kept import TARGETS
from opd.samplers.off_policy import RoutedSampler
from opd.samplers.served import ServedSampler
from opd.teachers.base import Teacher
from opd.teachers.cache import CachedTeacher, KeptScores
from opd.teachers.ema import Ema
from opd.teachers.ensemble import Ensemble
from opd.teachers.identities import Identities
from opd.teachers.local import LocalTeacher, on_device_meanwhile
from opd.teachers.server import RemoteTeacher
from opd.teachers.store import TensorStore
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies, joined
from opd.trainer.load_models import GivenModel, LoadedModel, load_model, make_sampler, sampling_of
from opd.trainer.policy import Policy
from opd.trainer.served import ServedTeacher, serve
from opd.types import Prompt, TargetKind


@dataclass(frozen=True, kw_only=True)
class TeacherSet:
    """All teachers of a run; empty where a reward is all there is."""

    loaded: Mapping[str, LoadedModel]
    """Those that are models in this process, by name."""
    teacher: Teacher | None = None
    """The one teacher, or all of them as one."""
    ensemble: Ensemble | None = None
    """The same where there are several."""
    kind: TargetKind | None = None
    """The kind of target that the objective is bound to."""
    vocabulary: VocabularyMatch
    ema: Ema | None = None
    """EMA weights, updated after every optimizer step; None without an EMA teacher."""
    members: Mapping[str, Teacher] = field(default_factory=dict)
    served: Mapping[str, ServedTeacher] = field(default_factory=dict)
    """Those behind servers."""
    said: tuple[str, ...] = ()
    """Warnings about the servers."""
    kept: KeptScores | None = None
    """Counts the scores that are kept; None where no teacher keeps any."""

    def sampler(
        self,
        rollout: RolloutConfig,
        pad_id: int,
        student: LoadedModel | None = None,
        ranks: Ranks = ALONE,
        *,
        servers: bool = False,
        around: Callable[[str], Callable[[], AbstractContextManager[None]]] | None = None,
    ) -> AdjustableSampler | None:
        """Draws the teacher's own answers; of several teachers, each prompt's own, or one drawn by its weights. With `student`, the
        rollouts hold the student's rendering of the prompt. None where a teacher is no model in this process; with `servers`, one
        behind an inference server will do. `around` says of a teacher what is entered around its sampling, in place of its own
        context."""
        samplers: dict[str, AdjustableSampler] = {
            name: make_sampler(
                rollout,
                loaded,
                self.vocabulary,
                pad_id,
                source="teacher",
                student_renderer=None if student is None else student.renderer,
                model_context=self.members[name].context if around is None else around(name),
                ranks=ranks,
            )
            for name, loaded in self.loaded.items()
        }
        if servers and student is not None:
            for name, one in self.served.items():
                if isinstance(one, RemoteTeacher):
                    samplers[name] = ServedSampler(one, sampling_of(rollout), student.renderer)
        if samplers.keys() != self.members.keys():
            return None
        return (
            next(iter(samplers.values()), None)
            if self.ensemble is None
            else RoutedSampler(samplers, self.ensemble.choice)
        )

    def policy(self) -> Policy | None:
        """The teacher to be evaluated as the student is; several have no one distribution to evaluate."""
        if self.ensemble is not None or self.teacher is None or not self.loaded:
            return None
        (loaded,) = self.loaded.values()
        return Policy(loaded.model, vocabulary=self.vocabulary, eos_ids=loaded.eos, teacher_logits=self.teacher.logits)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt has a teacher, or weights that sum to one. Raises DataError that names the first that has not."""
        for prompt in prompts if self.ensemble is not None else ():
            self.ensemble.choice(prompt)  # pyright: ignore[reportOptionalMemberAccess]


def build_teachers(
    config: Config,
    student: LoadedModel,
    model: PreTrainedModel,
    given: Mapping[str, GivenModel | Teacher],
    loading: Loading | None = None,
    home: str | None = None,
) -> TeacherSet:
    """Load every teacher that is not `given`, and check it against the student, whose trained form is `model`. With `home` their
    weights stay on that device, until they are divided. Raises the OpdError of whatever does not fit."""
    sections = config.all_teachers
    averaged = {section.ema_decay for section in sections.values() if section.source == "ema"}
    if len(averaged) > 1:
        raise ConfigError(
            "Two teachers with source=ema and different ema_decay: a run keeps one average. Use one of them."
        )
    ema = Ema(model, averaged.pop()) if averaged else None
    own = {name: teacher for name, teacher in given.items() if not isinstance(teacher, GivenModel)}
    models = {name: one for name, one in given.items() if isinstance(one, GivenModel)}
    served = {
        name: serve(section, _role(name), student, config)
        for name, section in sections.items()
        if section.url and name not in own
    }
    own |= served
    loaded = {
        name: _load(config, name, student, model, ema, models.get(name), loading, home)
        for name in sections
        if name not in own
    }
    matches = {name: _vocabulary(config, name, student, one) for name, one in loaded.items()}
    vocabularies = [own[name].vocabulary if name in own else matches[name] for name in sections]
    # For models in this process what is common to all is what the student has: its tokens decide, and every teacher knows them.
    common = joined(vocabularies or [_vocabulary(config, None, student, student)])
    vocabulary = replace(common, warnings=tuple(dict.fromkeys(w for match in vocabularies for w in match.warnings)))
    for one in served.values():
        one.vocabulary = vocabulary
    members: dict[str, Teacher] = {
        name: own[name] if name in own else _local(config, name, loaded[name], student, model, vocabulary)
        for name in sections
    }
    members = _cached(config, members)
    ensemble = _ensemble(config, members) if len(members) > 1 else None
    teacher = ensemble or next(iter(members.values()), None)
    kind = None if teacher is None else _bind(config, teacher)
    caches = [member for member in members.values() if isinstance(member, CachedTeacher)]
    return TeacherSet(
        loaded=loaded,
        served=served,
        said=tuple(warning for one in served.values() for warning in one.connect()),
        members=members,
        teacher=teacher,
        ensemble=ensemble,
        kind=kind,
        vocabulary=vocabulary,
        ema=ema,
        kept=KeptScores(caches) if caches else None,
    )


def _local(
    config: Config,
    name: str,
    loaded: LoadedModel,
    student: LoadedModel,
    model: PreTrainedModel,
    vocabulary: VocabularyMatch,
) -> LocalTeacher:
    """A teacher in this process; the student's own weights stay trainable."""
    section = config.all_teachers[name]
    return LocalTeacher(
        loaded.model,
        loaded.renderer,
        vocabulary=vocabulary,
        pad_id=student.pad_id,
        name=section.model or f"the student ({section.source})",
        tokens_per_batch=section.tokens_per_batch,
        layout=config.train.layout,
        supply=None if section.supply == "auto" else section.supply,
        frozen=loaded.model is not model,
        **_model_context(section, loaded),
    )


def _role(name: str) -> str:
    """The teacher's section in a recipe."""
    return name if name == "teacher" else f"teachers.{name}"


def _load(
    config: Config,
    name: str,
    student: LoadedModel,
    model: PreTrainedModel,
    ema: Ema | None,
    given: GivenModel | None,
    loading: Loading | None,
    home: str | None,
) -> LoadedModel:
    """A teacher's own weights, or the student's with a rendering of their own."""
    section = config.all_teachers[name]
    role = _role(name)
    if section.source == "model":
        device = config.student.device if section.device == "auto" else section.device
        return load_model(section, role, config.prompts, device=device, given=given, loading=loading, home=home)
    own = config.student
    if section.chat_template_kwargs:
        own = replace(own, chat_template_kwargs=section.chat_template_kwargs)
    renderer = make_renderer(own, student.tokenizer, f"{role} ({section.source})", config.prompts, rewrites=True)
    weights = ema.model if section.source == "ema" and ema is not None else model
    return LoadedModel(model=weights, tokenizer=student.tokenizer, renderer=renderer, eos=student.eos)


def _model_context(
    section: TeacherConfig, loaded: LoadedModel
) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    if section.source == "adapter_off":
        return {"model_context": loaded.model.disable_adapter}  # pyright: ignore[reportReturnType]  # of a peft model
    if not section.offload:
        return {}
    device = resolve_device(str(loaded.model.device))
    if device.type == "cpu":
        raise ConfigError(
            f"teacher.offload=true keeps '{section.model}' in CPU memory between uses, and it runs on the CPU anyway; drop it."
        )
    return {"model_context": partial(on_device_meanwhile, loaded.model, device)}


def _cached(config: Config, members: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """The teachers, with kept scores where the recipe names a folder for them; one folder is opened once."""
    folders = {name: _cache_folder(config, name, members[name]) for name in config.all_teachers}
    stores = {place: TensorStore(place) for place in {Path(f).resolve() for f in folders.values() if f is not None}}
    for name, member in members.items():
        folder = folders[name]
        if isinstance(member, RemoteTeacher) and folder is not None:
            member.identities = Identities(Path(folder).resolve())
    return {
        name: member if (folder := folders[name]) is None else CachedTeacher(member, stores[Path(folder).resolve()])
        for name, member in members.items()
    }


def _cache_folder(config: Config, name: str, member: Teacher) -> str | Path | None:
    """The folder of the recipe; or where opd rollouts has put the scores of kept rollouts, if this teacher's can be kept."""
    section, rollout = config.all_teachers[name], config.rollout
    if section.cache is not None or rollout.source == "live" or section.source not in ("model", "adapter_off"):
        return section.cache
    small = "hidden" in member.supplies or (config.objective.support == "teacher_top_k" and "top_k" in member.supplies)
    return Path(rollout.path or "") / TARGETS if small and hasattr(type(member), "fingerprint") else None


def _vocabulary(config: Config, name: str | None, student: LoadedModel, other: LoadedModel) -> VocabularyMatch:
    section = config.student if name is None else config.all_teachers[name]
    return check_vocabularies(
        student.tokenizer,
        other.tokenizer,
        vocabulary_rows(student.model),
        vocabulary_rows(other.model),
        student_name=config.student.model,
        teacher_name=section.model or config.student.model,
        student_eos=student.eos,
        teacher_eos=other.eos,
    )


def _ensemble(config: Config, members: Mapping[str, Teacher]) -> Ensemble:
    mixture, steps = config.mixture, config.train.steps

    def weights_at(step: int) -> Mapping[str, float]:
        return mixture.at(step, steps, list(members))

    return Ensemble(
        members=members,
        mixture=mixture.kind,
        weights=weights_at(steps - 1),  # what evaluations compare with throughout; a step takes its own
        weights_at=weights_at,
        weights_column=mixture.weights_column,
        balance_tokens=mixture.balance_tokens,
    )


def _bind(config: Config, teacher: Teacher) -> TargetKind:
    try:
        return teacher.bind_objective(config.objective)
    except ObjectiveError as error:
        limits = [s.supply for s in config.all_teachers.values() if s.supply != "auto"]
        if not limits:
            raise
        raise ObjectiveError(
            f"{error} (teacher.supply={limits[0]} is what limits it; teacher.supply=auto lifts that.)"
        ) from None
