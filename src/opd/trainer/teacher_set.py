"""The teachers of a run, loaded once: as scorers of the student's samples, and as models that answer prompts themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from opd.config import Config, TeacherConfig
from opd.errors import ConfigError, ObjectiveError
from opd.models import resolve_device, vocabulary_rows
from opd.samplers.hf import HfSampler
from opd.samplers.off_policy import RoutedSampler
from opd.teachers.ensemble import AnyTeacher, Ensemble
from opd.teachers.local import LocalTeacher, on_device_meanwhile
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies
from opd.trainer.ema import Ema
from opd.trainer.load_models import LoadedModel, load_side, make_renderer, make_sampler
from opd.trainer.student import Policy
from opd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class TeacherSet:
    """Everybody that teaches in a run; empty where a reward is all there is."""

    sides: Mapping[str, LoadedModel]
    teachers: Mapping[str, LocalTeacher]
    scorer: AnyTeacher | None
    """The one teacher, or all of them as one."""
    vocabulary: VocabularyMatch
    ema: Ema | None = None
    """The average that one of them is, to be moved along after every update."""

    def sampler(
        self, config: Config, pad_id: int, student: LoadedModel | None = None
    ) -> HfSampler | RoutedSampler | None:
        """Draws the teacher's own answers; of several teachers, each prompt's own, or one drawn by its weights. With `student`, the
        rollouts hold the student's rendering of the prompt."""
        samplers = {
            name: make_sampler(
                config,
                side,
                self.vocabulary,
                pad_id,
                source="teacher",
                student_renderer=None if student is None else student.renderer,
                presence=self.teachers[name].active,
            )
            for name, side in self.sides.items()
        }
        scorer = self.scorer
        if isinstance(scorer, Ensemble):
            return RoutedSampler(samplers, partial(_choice, scorer))
        return next(iter(samplers.values()), None)

    def policy(self) -> Policy | None:
        """The teacher to be evaluated as the student is; several have no one distribution to evaluate."""
        if not isinstance(self.scorer, LocalTeacher):
            return None
        (side,) = self.sides.values()
        return Policy(side.model, vocabulary=self.vocabulary, eos_ids=side.eos, teacher_logits=self.scorer.logits)


def _choice(ensemble: Ensemble, prompt: Prompt) -> dict[str, float]:
    if ensemble.mixture == "routing":
        return {ensemble.route(prompt): 1.0}
    return dict(zip(ensemble.members, ensemble.weights_of(prompt), strict=True))


def build_faculty(config: Config, student: LoadedModel, pad_id: int, model: PreTrainedModel) -> TeacherSet:
    """Load every teacher and check it against the student, whose trained form is `model`. Raises the OpdError of whatever does not
    fit."""
    sections = config.all_teachers
    averaged = {section.ema_decay for section in sections.values() if section.source == "ema"}
    if len(averaged) > 1:
        raise ConfigError(
            "Two teachers with source=ema and different ema_decay: a run keeps one average. Use one of them."
        )
    ema = Ema(model, averaged.pop()) if averaged else None
    sides = {name: _side(config, name, student, model, ema) for name in sections}
    matches = {name: _vocabulary(config, name, student, side) for name, side in sides.items()}
    # What is common to all is what the student has: the student's tokens decide, and every teacher knows them.
    vocabulary = next(iter(matches.values()), None) or _vocabulary(config, None, student, student)
    vocabulary = VocabularyMatch(
        size=vocabulary.size,
        invalid_ids=vocabulary.invalid_ids,
        warnings=tuple(dict.fromkeys(w for match in matches.values() for w in match.warnings)),
    )
    teachers = {
        name: LocalTeacher(
            side.model,
            side.renderer,
            vocabulary=vocabulary,
            pad_id=pad_id,
            name=section.model or f"the student ({section.source})",
            tokens_per_batch=section.tokens_per_batch,
            layout=config.train.layout,
            supply=None if section.supply == "auto" else section.supply,
            frozen=side.model is not model,
            **_presence(section, side),
        )
        for (name, section), side in zip(sections.items(), sides.values(), strict=True)
    }
    scorer = _as_one(config, teachers)
    if scorer is not None:
        _match(config, sections, scorer)
    return TeacherSet(sides=sides, teachers=teachers, scorer=scorer, vocabulary=vocabulary, ema=ema)


def _side(config: Config, name: str, student: LoadedModel, model: PreTrainedModel, ema: Ema | None) -> LoadedModel:
    """A teacher's own weights, or the student's with a rendering of their own."""
    section, template = config.all_teachers[name], config.prompts.teacher_prompt
    role = "teacher" if name == "teacher" else f"teachers.{name}"
    if section.source == "model":
        device = config.student.device if section.device == "auto" else section.device
        return load_side(section, role, device, config.prompts.system, template)
    if section.chat_template_kwargs:
        own = replace(config.student, chat_template_kwargs=section.chat_template_kwargs)
    else:
        own = config.student
    renderer = make_renderer(own, student.tokenizer, f"{role} ({section.source})", config.prompts.system, template)
    weights = ema.model if section.source == "ema" and ema is not None else model
    return LoadedModel(model=weights, tokenizer=student.tokenizer, renderer=renderer, eos=student.eos)


def _presence(section: TeacherConfig, side: LoadedModel) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    if section.source == "adapter_off":
        return {"presence": side.model.disable_adapter}  # pyright: ignore[reportReturnType]  # of a peft model
    if not section.offload:
        return {}
    device = resolve_device(str(side.model.device))
    if device.type == "cpu":
        raise ConfigError(
            f"teacher.offload=true keeps '{section.model}' in CPU memory between uses, and it runs on the CPU anyway; drop it."
        )
    return {"presence": partial(on_device_meanwhile, side.model, device)}


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


def _as_one(config: Config, teachers: Mapping[str, LocalTeacher]) -> AnyTeacher | None:
    if len(teachers) < 2:
        return next(iter(teachers.values()), None)
    last = config.train.steps - 1  # what evaluations compare with throughout; a step takes its own
    return Ensemble(
        members=teachers,
        mixture=config.mixture.kind,
        weights=config.mixture.at(last, config.train.steps, list(teachers)),
        weights_column=config.mixture.weights_column,
    )


def _match(config: Config, sections: Mapping[str, TeacherConfig], teacher: AnyTeacher) -> None:
    try:
        teacher.serve(config.objective)
    except ObjectiveError as error:
        limits = [s.supply for s in sections.values() if s.supply != "auto"]
        if not limits:
            raise
        raise ObjectiveError(
            f"{error} (teacher.supply={limits[0]} is what limits it; teacher.supply=auto lifts that.)"
        ) from None


def check_teachers(faculty: TeacherSet, prompts: Sequence[Prompt]) -> None:
    """Every prompt has a teacher, or weights that sum to one. Raises DataError that names the first that has not."""
    if isinstance(faculty.scorer, Ensemble):
        for prompt in prompts:
            _choice(faculty.scorer, prompt)
