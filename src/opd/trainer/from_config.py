"""Config → the components of a run, checked against each other before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config, RewardConfig, StudentConfig
from opd.data.chat import left_out_notices
from opd.data.prompts import PromptSchedule, load_prompts, unread_columns
from opd.data.rendering import Renderer
from opd.errors import ConfigError
from opd.rewards import Reward, Scorer, load_reward
from opd.samplers.base import AdjustableSampler, Sampler, Sampling
from opd.samplers.off_policy import DatasetResponses, OnOffPolicySampler
from opd.seeding import derive_seed
from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.checks import check_lengths, check_packing, check_rows, check_tokens, notices, saved_notes
from opd.trainer.evaluate import Evaluator, measure_of
from opd.trainer.fingerprints import HELD_OUT, prompts_fingerprint, tokenizer_fingerprint, weights_fingerprint
from opd.trainer.load_models import GivenModel, LoadedModel, load_model, make_sampler
from opd.trainer.reading import check_reading, check_text, sampled_weights
from opd.trainer.reinforce import Reinforcement
from opd.trainer.scoring import StepScorer
from opd.trainer.student import Policy, Student, add_lora, no_teacher
from opd.trainer.teacher_set import TeacherSet, build_teachers
from opd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Given:
    """Python objects in the place of what the config names; the config holds a description of each."""

    student: GivenModel | None = None
    teachers: Mapping[str, GivenModel | Teacher] = field(default_factory=dict)
    prompts: Iterable[Any] | None = None
    eval_prompts: Iterable[Any] | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    """Functions by their description."""
    sampler: Sampler | None = None

    def reward(self, name: str, config: RewardConfig) -> Scorer:
        """The reward of this name or description, called as the recipe says. Raises ConfigError."""
        return Scorer(
            reward=self.rewards.get(name) or load_reward(name), timeout=config.timeout, on_error=config.on_error
        )


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """Everything a run needs, built once."""

    config: Config
    student: Student
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    """Draws the rollouts of training."""
    student_sampler: AdjustableSampler
    """The student in this process, for evaluations."""
    scorer: StepScorer
    teacher: Teacher | None
    """None where the student learns from a reward alone."""
    teacher_sampler: AdjustableSampler | None
    """The teacher on its own rendering of the prompts, for evaluations."""
    teacher_policy: Policy | None
    """The teacher's weights, to be evaluated as the student is; None for several."""
    schedule: PromptSchedule
    evaluator: Evaluator | None
    student_files: Mapping[str, bytes]
    """Tokenizer and processor files of the student's model."""
    renderer: Renderer
    pad_id: int
    fingerprints: dict[str, str]
    """Of the prompts, of the student's first weights and tokenizer, and of the teachers'."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """Facts that need no action."""


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything that is loaded, before it is connected."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    student: LoadedModel
    model: PreTrainedModel
    """The student as it trains: itself, or with adapters."""
    teachers: TeacherSet
    measured: Scorer
    """The reward of evaluations."""


def build_components(config: Config, given: Given | None = None) -> RunComponents:
    """Load, check and connect. Raises the OpdError of whatever does not fit; nothing has been trained by then."""
    given = given or Given()
    said: list[str] = []
    prompts, held_out = _prompts(config, given, said.append)
    everything = [*prompts, *held_out]
    check_rows(config, prompts, held_out)
    measured = given.reward(config.eval.reward, config.reward)
    student = load_model(config.student, "student", config.prompts, device=config.student.device, given=given.student)
    # Before vocabularies are compared: where a tokenizer lost its own, that is the reason to give.
    said += check_text(student.renderer, "student", everything)
    first_weights = weights_fingerprint(student.model)
    first_entries = sampled_weights(student.model)
    model = _trainable(config.student, student.model, seed=config.seed)
    teachers = build_teachers(config, student, model, given.teachers)
    teachers.check_prompts(everything)
    check_tokens(config.objective, config.rollout, student.renderer, teachers.vocabulary)
    for role, one in {"student": student, **teachers.loaded}.items():
        check_lengths(everything, one.renderer, one.model, config.rollout.max_new_tokens)
        if config.train.layout == "packed":
            check_packing(one.model, role, student.pad_id)
    said += check_reading(config, everything, student, teachers.loaded, first_entries)
    said += left_out_notices(one.renderer.chat for one in (student, *teachers.loaded.values()))
    inputs = _Inputs(
        prompts=prompts, held_out=held_out, student=student, model=model, teachers=teachers, measured=measured
    )
    return _connect(config, given, inputs, _fingerprints(config, inputs, first_weights), said)


def _connect(
    config: Config, given: Given, inputs: _Inputs, fingerprints: dict[str, str], said: list[str]
) -> RunComponents:
    loaded, teachers = inputs.student, inputs.teachers
    teacher, vocabulary, pad_id, rollout = teachers.teacher, teachers.vocabulary, loaded.pad_id, config.rollout
    student = Student(
        inputs.model,
        config.optimizer,
        vocabulary=vocabulary,
        eos_ids=loaded.eos,
        total_steps=config.train.steps,
        autocast=config.train.autocast == "bfloat16",
        gradient_checkpointing=config.student.gradient_checkpointing,
        plain_sampling=rollout.temperature == 1 and rollout.top_p == 1 and rollout.top_k == 0,
        teacher_logits=no_teacher if teacher is None else teacher.logits,
        ema=teachers.ema,
    )
    student_sampler = make_sampler(
        rollout,
        loaded,
        vocabulary,
        pad_id,
        source="student",
        model=inputs.model,
        autocast=student.autocast,
        record_entropy=config.train.token_fraction < 1,
    )
    scorer = StepScorer(
        objective=config.objective,
        rl=config.rl,
        train=config.train,
        teacher=teacher,
        kind=teachers.kind,
        ensemble=teachers.ensemble,
        reinforcement=_reinforcement(config, given, inputs, vocabulary),
        pad_id=pad_id,
        device=student.device,
    )
    return RunComponents(
        config=config,
        student=student,
        tokenizer=loaded.tokenizer,
        student_sampler=student_sampler,
        sampler=_sampler(config, given.sampler or student_sampler, inputs),
        scorer=scorer,
        teacher=teacher,
        teacher_sampler=teachers.sampler(rollout, pad_id),
        teacher_policy=teachers.policy(),
        schedule=PromptSchedule(
            inputs.prompts, seed=derive_seed(config.seed, 0, "prompts"), shuffle=config.prompts.shuffle
        ),
        evaluator=_evaluator(config, inputs) if inputs.held_out else None,
        student_files=loaded.files,
        renderer=loaded.renderer,
        pad_id=pad_id,
        fingerprints=fingerprints,
        warnings=tuple(dict.fromkeys([*said, *vocabulary.warnings, *notices(config)])),
        notes=() if given.student else tuple(saved_notes(config.student, loaded.model)),
    )


def _sampler(config: Config, on_policy: Sampler, inputs: _Inputs) -> Sampler:
    """The student's sampler, or with rollout.lmbda < 1 a mix with another source."""
    student, rollout = inputs.student, config.rollout
    if rollout.lmbda == 1:
        return on_policy
    off_policy: Sampler | None = DatasetResponses(student.renderer, rollout.max_new_tokens, eos_ids=student.eos)
    if rollout.off_policy == "teacher":
        off_policy = inputs.teachers.sampler(rollout, student.pad_id, student=student)
    if off_policy is None:
        raise ConfigError(
            "rollout.off_policy=teacher draws samples from the teacher, and a teacher object of your own is no model that could draw them. "
            "Use rollout.off_policy=dataset, or rollout.lmbda=1."
        )
    return OnOffPolicySampler(on_policy, off_policy, rollout.lmbda)


def _fingerprints(config: Config, inputs: _Inputs, first_weights: str) -> dict[str, str]:
    found = {"training prompts": prompts_fingerprint(inputs.prompts)}
    if inputs.held_out:
        found[HELD_OUT] = prompts_fingerprint(inputs.held_out)
    student = inputs.student
    found["student's starting weights"] = first_weights
    found["student's tokenizer and chat template"] = tokenizer_fingerprint(student.tokenizer, student.eos)
    for name, teacher in inputs.teachers.loaded.items():
        if config.all_teachers[name].source == "model":
            whose = "teacher" if name == "teacher" else f"teacher {name}"
            found[f"{whose}'s own weights"] = weights_fingerprint(teacher.model)
            found[f"{whose}'s tokenizer and chat template"] = tokenizer_fingerprint(teacher.tokenizer, teacher.eos)
    return found


def _reinforcement(config: Config, given: Given, inputs: _Inputs, vocabulary: VocabularyMatch) -> Reinforcement | None:
    if not config.rl.rewarded:
        return None
    reference, model = None, inputs.model
    if config.rl.reference_kl > 0:
        adapted = config.student.lora is not None
        reference = LocalTeacher(
            # Of the first weights: a resumed run loads its own over them later.
            model if adapted else copy.deepcopy(model),
            inputs.student.renderer,
            frozen=not adapted,
            model_context=model.disable_adapter if adapted else nullcontext,  # pyright: ignore[reportArgumentType]  # of a peft model
            vocabulary=vocabulary,
            pad_id=inputs.student.pad_id,
            name="the reference",
            tokens_per_batch=config.train.tokens_per_microbatch,
            layout=config.train.layout,
        )
    scorer = given.reward(config.rl.reward or config.eval.reward, config.reward)
    return Reinforcement(config.rl, scorer, reference=reference)


def _prompts(config: Config, given: Given, say: Callable[[str], None]) -> tuple[list[Prompt], list[Prompt]]:
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
    prompts = load_prompts(section.path, split=section.split, limit=section.limit, rows=given.prompts, **columns)
    for note in unread_columns(prompts, section.path, elsewhere):
        say(note)
    if len(prompts) < config.train.prompts_per_step:
        say(
            f"train.prompts_per_step={config.train.prompts_per_step} is more than {section.path} has rows ({len(prompts)}), so a step "
            "holds some prompts several times."
        )
    if config.eval.every == 0 or section.eval_path is None:
        return prompts, []
    held_out = load_prompts(
        section.eval_path, split=section.eval_split, limit=config.eval.prompts, rows=given.eval_prompts, **columns
    )
    return prompts, held_out


def _evaluator(config: Config, inputs: _Inputs) -> Evaluator:
    section, rollout, teachers = config.eval, config.rollout, inputs.teachers
    sampling = Sampling(max_new_tokens=rollout.max_new_tokens, temperature=section.temperature, stop=rollout.stop)
    measured = (prompts_fingerprint(inputs.held_out), section.samples_per_prompt, section.temperature, section.reward)
    return Evaluator(
        measure=measure_of(*measured, rollout.max_new_tokens),
        prompts=inputs.held_out,
        samples_per_prompt=section.samples_per_prompt,
        scorer=inputs.measured,
        teacher=teachers.teacher,
        mixed={} if teachers.ensemble is None else teachers.ensemble.mixed,
        teacher_logp_floor=config.objective.teacher_logp_floor,
        sampling=sampling,
        extra_temperatures=section.extra_temperatures,
        layout=config.train.layout,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_id=inputs.student.pad_id,
        seed=config.seed,
    )


def _trainable(config: StudentConfig, model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    if config.lora is None:
        return model
    try:
        return add_lora(model, config.lora, seed=derive_seed(seed, 0, "lora"))
    except ValueError as error:  # peft's, for a module name that the model lacks
        raise ConfigError(
            f"student.lora.target_modules='{config.lora.target_modules}' does not fit {type(model).__name__}: {error} "
            "Use all-linear, or names such as q_proj,v_proj."
        ) from error
