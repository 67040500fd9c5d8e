"""Config → the parts of a run, checked against each other before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config, StudentConfig, TeacherConfig
from opd.data.prompts import PromptOrder, load_prompts
from opd.data.rendering import Renderer, eos_ids
from opd.errors import ConfigError, ObjectiveError
from opd.models import (
    load_causal_lm,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    vocabulary_rows,
)
from opd.rewards import Scorer, load_reward
from opd.rollouts.base import Sampling
from opd.rollouts.hf import HfSampler
from opd.rollouts.mix import DatasetResponses, MixedSampler
from opd.seeding import derive_seed
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies
from opd.trainer.checks import check_lengths, check_packing, check_rows, check_tokens, notices
from opd.trainer.evaluate import Evaluator
from opd.trainer.fingerprints import prompts_fingerprint, weights_fingerprint
from opd.trainer.guardrails import memory_advice
from opd.trainer.reinforce import Reinforcement
from opd.trainer.scoring import StepScorer
from opd.trainer.student import Policy, Student, add_lora
from opd.types import HiddenTarget, Prompt, RolloutSource


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs, built once."""

    student: Student
    student_sampler: HfSampler
    sampler: MixedSampler
    scorer: StepScorer
    teacher: LocalTeacher | None
    """None where the student learns from a reward alone."""
    teacher_sampler: HfSampler | None
    """The teacher on its own rendering of the prompts, for evaluation."""
    teacher_policy: Policy | None
    """The teacher's weights, to be evaluated as the student is."""
    order: PromptOrder
    evaluator: Evaluator | None
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    pad_id: int
    fingerprints: dict[str, str]
    """Of the prompts, the student's first weights and the teacher's."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Side:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    eos: tuple[int, ...]


def build_parts(config: Config) -> Parts:
    """Load, check and connect. Raises the OpdError of whatever does not fit; nothing has been trained by then."""
    prompts, held_out = _prompts(config)
    check_rows(config, prompts, held_out)
    scorer = _reward_scorer(config, config.eval.reward)
    student_side = _load_side(config.student, "student", config.student.device, config.prompts.system)
    teacher_side = _teacher_side(config)
    other = teacher_side or student_side  # without a teacher, what the student itself can say
    vocabulary = check_vocabularies(
        student_side.tokenizer,
        other.tokenizer,
        vocabulary_rows(student_side.model),
        vocabulary_rows(other.model),
        student_name=config.student.model,
        teacher_name=config.teacher.model if config.teacher else config.student.model,
        student_eos=student_side.eos,
        teacher_eos=other.eos,
    )
    pad_id = _pad_id(student_side)
    teacher = None
    if teacher_side is not None:
        assert config.teacher is not None
        teacher = LocalTeacher(
            teacher_side.model,
            teacher_side.renderer,
            vocabulary=vocabulary,
            pad_id=pad_id,
            name=config.teacher.model,
            tokens_per_batch=config.teacher.tokens_per_batch,
            layout=config.train.layout,
            supply=None if config.teacher.supply == "auto" else config.teacher.supply,
        )
        _match_teacher(config, config.teacher, teacher)
    check_tokens(config, student_side.renderer, vocabulary)
    for side, role in ((student_side, "student"), (teacher_side, "teacher")):
        if side is None:
            continue
        check_lengths(config, [*prompts, *held_out], side.renderer, side.model)
        if config.train.layout == "packed":
            check_packing(side.model, role, pad_id)
    return _connect(config, prompts, held_out, student_side, teacher_side, teacher, vocabulary, pad_id, scorer)


def _connect(
    config: Config,
    prompts: list[Prompt],
    held_out: list[Prompt],
    student_side: _Side,
    teacher_side: _Side | None,
    teacher: LocalTeacher | None,
    vocabulary: VocabularyMatch,
    pad_id: int,
    scorer: Scorer,
) -> Parts:
    fingerprints = {
        "prompts": prompts_fingerprint([*prompts, *held_out]),
        "student's first weights": weights_fingerprint(student_side.model),
    }
    if teacher_side is not None:
        fingerprints["teacher's weights"] = weights_fingerprint(teacher_side.model)
    model = _trainable(config, student_side)
    student = Student(
        model,
        config.optimizer,
        vocabulary=vocabulary,
        eos_ids=student_side.eos,
        total_steps=config.train.steps,
        autocast=config.train.autocast == "bfloat16",
        gradient_checkpointing=config.student.gradient_checkpointing,
        plain_sampling=config.rollout.temperature == 1 and config.rollout.top_p == 1 and config.rollout.top_k == 0,
        teacher_logits=_teacher_logits(teacher),
    )
    student_sampler = _sampler(
        config, student_side, vocabulary, pad_id, source="student", model=model, autocast=student.autocast
    )
    off_policy = (
        _sampler(config, teacher_side, vocabulary, pad_id, source="teacher", student_renderer=student_side.renderer)
        if config.rollout.off_policy == "teacher" and teacher_side is not None
        else DatasetResponses(student_side.renderer, config.rollout.max_new_tokens, eos_ids=student_side.eos)
    )
    teacher_sampler, teacher_policy = _evaluated_teacher(config, teacher_side, teacher, vocabulary, pad_id)
    return Parts(
        student=student,
        student_sampler=student_sampler,
        sampler=MixedSampler(student_sampler, off_policy if config.rollout.lmbda < 1 else None, config.rollout.lmbda),
        scorer=StepScorer(
            config,
            teacher=teacher,
            reinforcement=_reinforcement(config, model, student_side, vocabulary, pad_id),
            pad_id=pad_id,
            device=student.device,
        ),
        teacher=teacher,
        teacher_sampler=teacher_sampler,
        teacher_policy=teacher_policy,
        order=PromptOrder(prompts, seed=derive_seed(config.seed, 0, "prompts"), shuffle=config.prompts.shuffle),
        evaluator=_evaluator(config, held_out, teacher, pad_id, scorer) if held_out else None,
        tokenizer=student_side.tokenizer,
        renderer=student_side.renderer,
        pad_id=pad_id,
        fingerprints=fingerprints,
        warnings=(*vocabulary.warnings, *notices(config)),
    )


def _evaluated_teacher(
    config: Config, side: _Side | None, teacher: LocalTeacher | None, vocabulary: VocabularyMatch, pad_id: int
) -> tuple[HfSampler | None, Policy | None]:
    """The teacher as one that answers prompts itself."""
    if side is None:
        return None, None
    sampler = _sampler(config, side, vocabulary, pad_id, source="teacher")
    logits = _teacher_logits(teacher)
    return sampler, Policy(side.model, vocabulary=vocabulary, eos_ids=side.eos, teacher_logits=logits)


def _teacher_side(config: Config) -> _Side | None:
    if config.teacher is None:
        return None
    device = config.student.device if config.teacher.device == "auto" else config.teacher.device
    return _load_side(config.teacher, "teacher", device, config.prompts.system)


def _teacher_logits(teacher: LocalTeacher | None) -> Callable[[HiddenTarget], Tensor]:
    if teacher is not None:
        return teacher.logits

    def none(_target: HiddenTarget) -> Tensor:
        raise AssertionError("a run without a teacher has no hidden targets")

    return none


def _reward_scorer(config: Config, reward: str) -> Scorer:
    return Scorer(reward=load_reward(reward), timeout=config.reward.timeout, on_error=config.reward.on_error)


def _reinforcement(
    config: Config, model: PreTrainedModel, side: _Side, vocabulary: VocabularyMatch, pad_id: int
) -> Reinforcement | None:
    if not config.rl.rewarded:
        return None
    reference = None
    if config.rl.reference_kl > 0:
        reference = LocalTeacher(
            copy.deepcopy(model),  # of the first weights; a resumed run loads its own over them later
            side.renderer,
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


def _load_side(config: StudentConfig | TeacherConfig, role: str, device_name: str, system: str | None) -> _Side:
    device = resolve_device(device_name)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "role": role}
    tokenizer = load_tokenizer(config.model, **options)
    with memory_advice("load"):
        model = load_causal_lm(
            config.model,
            dtype=resolve_dtype(config.dtype, device),
            device=device,
            attn_implementation=config.attn_implementation,
            **options,
        )
    renderer = Renderer(
        tokenizer, name=f"{role} '{config.model}'", chat_template_kwargs=config.chat_template_kwargs, system=system
    )
    return _Side(model=model, tokenizer=tokenizer, renderer=renderer, eos=eos_ids(model.generation_config, tokenizer))


def _pad_id(side: _Side) -> int:
    """Any id will do, because padding is masked by position; a tokenizer without one lends its EOS."""
    pad_id = side.tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else side.eos[0]


def _sampler(
    config: Config,
    side: _Side,
    vocabulary: VocabularyMatch,
    pad_id: int,
    *,
    source: RolloutSource,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> HfSampler:
    rollout = config.rollout
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )
    return HfSampler(
        model or side.model,
        side.renderer,
        sampling,
        eos_ids=side.eos,
        pad_id=pad_id,
        vocabulary=vocabulary,
        batch_size=rollout.batch_size,
        source=source,
        **options,
    )


def _prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    section = config.prompts
    columns = {
        "prompt_column": section.prompt_column,
        "answer_column": section.answer_column,
        "response_column": section.response_column,
        "teacher_column": section.teacher_column,
    }
    prompts = load_prompts(section.path, split=section.split, limit=section.limit, **columns)
    if config.eval.every == 0 or section.eval_path is None:
        return prompts, []
    held_out = load_prompts(section.eval_path, split=section.eval_split, limit=config.eval.prompts, **columns)
    return prompts, held_out


def _evaluator(
    config: Config, held_out: list[Prompt], teacher: LocalTeacher | None, pad_id: int, scorer: Scorer
) -> Evaluator:
    return Evaluator(
        prompts=held_out,
        samples_per_prompt=config.eval.samples_per_prompt,
        scorer=scorer,
        teacher=teacher,
        teacher_logp_floor=config.objective.teacher_logp_floor,
        temperature=config.eval.temperature,
        extra_temperatures=config.eval.extra_temperatures,
        layout=config.train.layout,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_id=pad_id,
        seed=config.seed,
    )


def _trainable(config: Config, side: _Side) -> PreTrainedModel:
    if config.student.lora is None:
        return side.model
    try:
        return add_lora(side.model, config.student.lora, seed=derive_seed(config.seed, 0, "lora"))
    except ValueError as error:  # peft's, for a module name that the model lacks
        raise ConfigError(
            f"student.lora.target_modules='{config.student.lora.target_modules}' does not fit {type(side.model).__name__}: {error} "
            "Use all-linear, or names such as q_proj,v_proj."
        ) from error


def _match_teacher(config: Config, section: TeacherConfig, teacher: LocalTeacher) -> None:
    try:
        teacher.serve(config.objective)
    except ObjectiveError as error:
        if section.supply == "auto":
            raise
        raise ObjectiveError(
            f"{error} (teacher.supply={section.supply} is what limits it; teacher.supply=auto lifts that.)"
        ) from None
