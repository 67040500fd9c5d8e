"""Recipe → the doctor's checks, from the components that a run of it would have. Nothing is trained, and no run folder is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from opd.config import Config, VllmConfig
from opd.config.rollout import DEFAULT_IMPORTANCE_CAP
from opd.config.run import teacher_key
from opd.doctor.check import Check, Examination, failed, run_checks, skipped
from opd.doctor.device_memory import device_memory
from opd.doctor.machine import check_machine
from opd.doctor.memory_checks import memory_checks
from opd.doctor.model_shape import model_shape
from opd.doctor.reads import check_template, check_vocabulary
from opd.errors import DataError, OpdError, VocabularyError
from opd.models import vocabulary_rows
from opd.reporting.loading import Loading
from opd.teachers.exact_server import ExactServerTeacher
from opd.trainer.first_look import FirstLook
from opd.trainer.from_config import Given, RunComponents

PROMPTS = 32
LATER = ("vocabulary", "template", "memory", "alignment", "stop mass", "start", "reward")


def examine(
    config: Config, *, prompts: int = PROMPTS, given: Given | None = None, loading: Loading | None = None
) -> list[Check]:
    """Every check of a recipe, in the order in which a run would meet what they are about; `prompts` is how many are answered."""
    checks = run_checks({"machine": partial(check_machine, config)})
    limits = device_memory()  # before the models take some of it
    try:
        parts = RunComponents(in_process(config), given, loading)
    except Exception as error:  # reported as a check; the others need what could not be made
        name = _about(error)
        rest = (one for one in LATER if one != name)
        return [
            *checks,
            failed(name, error),
            *(skipped(one, "It needs the models of the recipe, and they could not be made ready.") for one in rest),
        ]
    return [*checks, *examine_parts(parts, prompts, limits)]


def examine_parts(parts: RunComponents, prompts: int = PROMPTS, limits: Mapping[str, int] | None = None) -> list[Check]:
    """The checks of a run's components; `limits` are the bytes of each device, by default those that are free now."""
    look = FirstLook(parts, prompts)
    examinations: Mapping[str, Examination] = {
        "recipe": lambda: [_recipe(parts)],
        "vocabulary": lambda: _vocabulary(parts),
        "template": lambda: _templates(look),
        "memory": lambda: _memory(look, device_memory() if limits is None else limits),
        "alignment": look.alignment,
        "stop mass": look.stop_mass,
        "start": look.start,
        "reward": look.reward,
    }
    return run_checks(examinations)


def in_process(config: Config) -> Config:
    """The recipe with answers drawn by transformers in this process and scores that are kept nowhere: the same distributions."""
    rollout = replace(
        config.rollout,
        engine="hf",
        vllm=VllmConfig(),
        ahead=0,
        importance_cap=DEFAULT_IMPORTANCE_CAP,
        source="live",
        path=None,
    )
    teachers = {name: replace(section, cache=None) for name, section in config.teachers.items()}
    teacher = None if config.teacher is None else replace(config.teacher, cache=None)
    return replace(config, rollout=rollout, teacher=teacher, teachers=teachers)


def _about(error: Exception) -> str:
    """The check that an error while loading belongs to."""
    if isinstance(error, VocabularyError):
        return "vocabulary"
    if isinstance(error, DataError):
        return "prompts"
    return "recipe" if isinstance(error, OpdError) else "models"


def _recipe(parts: RunComponents) -> Check:
    """The warnings with which a run of this recipe would begin."""
    about = set(parts.teachers.vocabulary.warnings)
    said = [warning for warning in parts.warnings if warning not in about]
    if not said:
        return Check(
            name="recipe", verdict="green", seen="The recipe gives no reason for a warning.", numbers={"warnings": 0}
        )
    return Check(
        name="recipe",
        verdict="yellow",
        seen=said[0],
        numbers={"warnings": len(said)},
        why="A run would begin with the same warning.",
        mend="the key that the warning names",
        details=tuple(said[1:]),
    )


def _vocabulary(parts: RunComponents) -> list[Check]:
    teachers = parts.teachers
    ends = [one.eos for one in teachers.loaded.values()]
    ends += [one.served.eos_ids for one in teachers.served.values() if isinstance(one, ExactServerTeacher)]
    teacher_eos = tuple(dict.fromkeys(i for eos in ends for i in eos))
    rows = vocabulary_rows(parts.loaded.model)
    return [check_vocabulary(teachers.vocabulary, len(parts.loaded.tokenizer), rows, parts.loaded.eos, teacher_eos)]


def _templates(look: FirstLook) -> list[Check]:
    parts = look.parts
    readers = {**parts.teachers.loaded, **parts.teachers.served}
    if not readers:
        return [skipped("template", "The recipe has no teacher with a tokenizer.")]
    shown_more = parts.config.prompts.teacher_prompt is not None
    return [
        check_template(
            parts.renderer, one.renderer, look.prompts_of(name), role=teacher_key(name), shown_more=shown_more
        )
        for name, one in readers.items()
    ]


def _memory(look: FirstLook, limits: Mapping[str, int]) -> list[Check]:
    """The estimate of `opd check`, with the longest of the prompts that are answered."""
    config = look.parts.config
    shapes = {
        role: model_shape(one.model, role, revision=one.revision, trust_remote_code=one.trust_remote_code)
        for role, one in config.all_models.items()
        if one.model
    }
    longest = max(len(look.parts.renderer.prompt_ids(prompt)) for prompt in look.prompts)
    return memory_checks(config, shapes, longest, limits)
