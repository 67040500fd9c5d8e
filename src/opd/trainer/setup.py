"""Config → the parts of a run, checked against each other before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from opd.config import Config
from opd.data.chat import left_out_notices
from opd.data.prompts import PromptSchedule, load_prompts, unread_columns
from opd.data.rendering import Renderer
from opd.errors import ConfigError
from opd.rewards import Scorer, load_reward
from opd.samplers.hf import HfSampler
from opd.samplers.off_policy import DatasetResponses, OnOffPolicySampler, RoutedSampler
from opd.seeding import derive_seed
from opd.teachers.ensemble import AnyTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.checks import check_lengths, check_packing, check_rows, check_tokens, notices, saved_notes
from opd.trainer.evaluate import Evaluator, measure_of
from opd.trainer.fingerprints import HELD_OUT, prompts_fingerprint, tokenizer_fingerprint, weights_fingerprint
from opd.trainer.load_models import LoadedModel, load_side, make_sampler, pad_id_of
from opd.trainer.reading import check_reading, check_text, sampled_weights
from opd.trainer.reinforce import Reinforcement
from opd.trainer.scoring import StepScorer
from opd.trainer.student import Policy, Student, add_lora, no_teacher
from opd.trainer.teacher_set import TeacherSet, build_faculty, check_teachers
from opd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """Everything a run needs, built once."""

    student: Student
    student_sampler: HfSampler
    sampler: OnOffPolicySampler
    scorer: StepScorer
    teacher: AnyTeacher | None
    """None where the student learns from a reward alone."""
    teacher_sampler: HfSampler | RoutedSampler | None
    """The teacher on its own rendering of the prompts, for evaluation."""
    teacher_policy: Policy | None
    """The teacher's weights, to be evaluated as the student is; None for several."""
    order: PromptSchedule
    evaluator: Evaluator | None
    student_files: Mapping[str, bytes]
    """Tokenizer and processor files of the student's model."""
    renderer: Renderer
    pad_id: int
    fingerprints: dict[str, str]
    """Of the prompts, of the student's first weights and tokenizer, and of the teachers'."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What is as it should be, and good to know."""


def build_parts(config: Config) -> RunComponents:
    """Load, check and connect. Raises the OpdError of whatever does not fit; nothing has been trained by then."""
    said: list[str] = []
    prompts, held_out = _prompts(config, said.append)
    check_rows(config, prompts, held_out)
    rewards = _reward_scorer(config, config.eval.reward)
    side = load_side(config.student, "student", config.student.device, config.prompts.system)
    # Before vocabularies are compared: where a tokenizer lost its own, that is the reason to give.
    said += check_text(side.renderer, "student", [*prompts, *held_out])
    pad_id = pad_id_of(side)
    first_weights = weights_fingerprint(side.model)
    loaded = sampled_weights(side.model)
    model = _trainable(config, side)
    faculty = build_faculty(config, side, pad_id, model)
    check_teachers(faculty, [*prompts, *held_out])
    check_tokens(config, side.renderer, faculty.vocabulary)
    for role, one in {"student": side, **faculty.sides}.items():
        check_lengths(config, [*prompts, *held_out], one.renderer, one.model)
        if config.train.layout == "packed":
            check_packing(one.model, role, pad_id)
    said += check_reading(config, [*prompts, *held_out], side, faculty.sides, loaded)
    said += left_out_notices(one.renderer.chat for one in (side, *faculty.sides.values()))
    fingerprints = _fingerprints(config, prompts, held_out, side, first_weights, faculty)
    return _connect(config, prompts, held_out, side, model, faculty, pad_id, rewards, fingerprints, said)


def _connect(
    config: Config,
    prompts: list[Prompt],
    held_out: list[Prompt],
    side: LoadedModel,
    model: PreTrainedModel,
    faculty: TeacherSet,
    pad_id: int,
    rewards: Scorer,
    fingerprints: dict[str, str],
    said: list[str],
) -> RunComponents:
    teacher, vocabulary = faculty.scorer, faculty.vocabulary
    student = Student(
        model,
        config.optimizer,
        vocabulary=vocabulary,
        eos_ids=side.eos,
        total_steps=config.train.steps,
        autocast=config.train.autocast == "bfloat16",
        loss_memory=config.train.loss_memory,
        gradient_checkpointing=config.student.gradient_checkpointing,
        plain_sampling=config.rollout.temperature == 1 and config.rollout.top_p == 1 and config.rollout.top_k == 0,
        teacher_logits=no_teacher if teacher is None else teacher.logits,
        ema=faculty.ema,
    )
    student_sampler = make_sampler(
        config,
        side,
        vocabulary,
        pad_id,
        source="student",
        model=model,
        autocast=student.autocast,
        record_entropy=config.train.token_fraction < 1,
    )
    return RunComponents(
        student=student,
        student_sampler=student_sampler,
        sampler=OnOffPolicySampler(student_sampler, _off_policy(config, side, faculty, pad_id), config.rollout.lmbda),
        scorer=StepScorer(
            config,
            teacher=teacher,
            reinforcement=_reinforcement(config, model, side, vocabulary, pad_id),
            pad_id=pad_id,
            device=student.device,
        ),
        teacher=teacher,
        teacher_sampler=faculty.sampler(config, pad_id),
        teacher_policy=faculty.policy(),
        order=PromptSchedule(prompts, seed=derive_seed(config.seed, 0, "prompts"), shuffle=config.prompts.shuffle),
        evaluator=_evaluator(config, held_out, teacher, pad_id, rewards) if held_out else None,
        student_files=side.files,
        renderer=side.renderer,
        pad_id=pad_id,
        fingerprints=fingerprints,
        warnings=tuple(dict.fromkeys([*said, *vocabulary.warnings, *notices(config)])),
        notes=tuple(saved_notes(config, side.model)),
    )


def _off_policy(
    config: Config, side: LoadedModel, faculty: TeacherSet, pad_id: int
) -> HfSampler | RoutedSampler | DatasetResponses | None:
    """Who gives the samples that the student does not draw."""
    if config.rollout.lmbda == 1:
        return None
    if config.rollout.off_policy == "teacher":
        return faculty.sampler(config, pad_id, student=side)
    return DatasetResponses(side.renderer, config.rollout.max_new_tokens, eos_ids=side.eos)


def _fingerprints(
    config: Config,
    prompts: list[Prompt],
    held_out: list[Prompt],
    side: LoadedModel,
    first_weights: str,
    faculty: TeacherSet,
) -> dict[str, str]:
    found = {"training prompts": prompts_fingerprint(prompts)}
    if held_out:
        found[HELD_OUT] = prompts_fingerprint(held_out)
    found["student's starting weights"] = first_weights
    found["student's tokenizer and chat template"] = tokenizer_fingerprint(side.tokenizer, side.eos)
    for name, teacher in faculty.sides.items():
        if config.all_teachers[name].source == "model":
            whose = "teacher" if name == "teacher" else f"teacher {name}"
            found[f"{whose}'s own weights"] = weights_fingerprint(teacher.model)
            found[f"{whose}'s tokenizer and chat template"] = tokenizer_fingerprint(teacher.tokenizer, teacher.eos)
    return found


def _reward_scorer(config: Config, reward: str) -> Scorer:
    return Scorer(reward=load_reward(reward), timeout=config.reward.timeout, on_error=config.reward.on_error)


def _reinforcement(
    config: Config, model: PreTrainedModel, side: LoadedModel, vocabulary: VocabularyMatch, pad_id: int
) -> Reinforcement | None:
    if not config.rl.rewarded:
        return None
    reference = None
    if config.rl.reference_kl > 0:
        adapted = config.student.lora is not None
        reference = LocalTeacher(
            # Of the first weights: a resumed run loads its own over them later.
            model if adapted else copy.deepcopy(model),
            side.renderer,
            frozen=not adapted,
            presence=model.disable_adapter if adapted else nullcontext,  # pyright: ignore[reportArgumentType]  # of a peft model
            vocabulary=vocabulary,
            pad_id=pad_id,
            name="the reference",
            tokens_per_batch=config.train.tokens_per_microbatch,
            layout=config.train.layout,
        )
    return Reinforcement(
        config.rl,
        _reward_scorer(config, config.rl.reward or config.eval.reward),
        samples_per_prompt=config.train.samples_per_prompt,
        reference=reference,
    )


def _prompts(config: Config, say: Callable[[str], None]) -> tuple[list[Prompt], list[Prompt]]:
    """The rows to train on, and those to evaluate on. `say` is told what rows hold and prompts do not."""
    section = config.prompts
    columns: dict[str, Any] = {
        "prompt_column": section.prompt_column,
        "answer_column": section.answer_column,
        "response_column": section.response_column,
        "teacher_column": section.teacher_column,
        "say": say,
    }
    elsewhere = f"{section.teacher_prompt} {section.prompt_column}"
    prompts = load_prompts(section.path, split=section.split, limit=section.limit, **columns)
    for note in unread_columns(prompts, section.path, elsewhere):
        say(note)
    if len(prompts) < config.train.prompts_per_step:
        say(
            f"train.prompts_per_step={config.train.prompts_per_step} is more than {section.path} has rows ({len(prompts)}), so a step "
            "holds some prompts several times."
        )
    if config.eval.every == 0 or section.eval_path is None:
        return prompts, []
    held_out = load_prompts(section.eval_path, split=section.eval_split, limit=config.eval.prompts, **columns)
    return prompts, held_out


def _evaluator(
    config: Config, held_out: list[Prompt], teacher: AnyTeacher | None, pad_id: int, scorer: Scorer
) -> Evaluator:
    section = config.eval
    measured = (prompts_fingerprint(held_out), section.samples_per_prompt, section.temperature, section.reward)
    return Evaluator(
        measure=measure_of(*measured, config.rollout.max_new_tokens),
        prompts=held_out,
        samples_per_prompt=config.eval.samples_per_prompt,
        scorer=scorer,
        teacher=teacher,
        max_new_tokens=config.rollout.max_new_tokens,
        teacher_logp_floor=config.objective.teacher_logp_floor,
        temperature=config.eval.temperature,
        extra_temperatures=config.eval.extra_temperatures,
        layout=config.train.layout,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_id=pad_id,
        seed=config.seed,
    )


def _trainable(config: Config, side: LoadedModel) -> PreTrainedModel:
    if config.student.lora is None:
        return side.model
    try:
        return add_lora(side.model, config.student.lora, seed=derive_seed(config.seed, 0, "lora"))
    except ValueError as error:  # peft's, for a module name that the model lacks
        raise ConfigError(
            f"student.lora.target_modules='{config.student.lora.target_modules}' does not fit {type(side.model).__name__}: {error} "
            "Use all-linear, or names such as q_proj,v_proj."
        ) from error
