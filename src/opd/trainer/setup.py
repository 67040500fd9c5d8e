"""Config → the parts of a run, checked against each other before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from opd.rewards import load_reward
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
from opd.trainer.student import Policy, Student, add_lora
from opd.types import Prompt, RolloutSource


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs, built once."""

    student: Student
    student_sampler: HfSampler
    sampler: MixedSampler
    teacher: LocalTeacher
    teacher_sampler: HfSampler
    """The teacher on its own rendering of the prompts, for evaluation."""
    teacher_policy: Policy
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
    student_side = _load_side(config.student, "student", config.student.device, config.prompts.system)
    teacher_device = config.student.device if config.teacher.device == "auto" else config.teacher.device
    teacher_side = _load_side(config.teacher, "teacher", teacher_device, config.prompts.system)
    vocabulary = check_vocabularies(
        student_side.tokenizer,
        teacher_side.tokenizer,
        vocabulary_rows(student_side.model),
        vocabulary_rows(teacher_side.model),
        student_name=config.student.model,
        teacher_name=config.teacher.model,
        student_eos=student_side.eos,
        teacher_eos=teacher_side.eos,
    )
    pad_id = _pad_id(student_side)
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
    _match_teacher(config, teacher)
    check_tokens(config, student_side.renderer, vocabulary)
    for side, role in ((student_side, "student"), (teacher_side, "teacher")):
        check_lengths(config, [*prompts, *held_out], side.renderer, side.model)
        if config.train.layout == "packed":
            check_packing(side.model, role, pad_id)
    return _connect(config, prompts, held_out, student_side, teacher_side, teacher, vocabulary, pad_id)


def _connect(
    config: Config,
    prompts: list[Prompt],
    held_out: list[Prompt],
    student_side: _Side,
    teacher_side: _Side,
    teacher: LocalTeacher,
    vocabulary: VocabularyMatch,
    pad_id: int,
) -> Parts:
    fingerprints = {
        "prompts": prompts_fingerprint([*prompts, *held_out]),
        "student's first weights": weights_fingerprint(student_side.model),
        "teacher's weights": weights_fingerprint(teacher_side.model),
    }
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
        teacher_logits=teacher.logits,
    )
    student_sampler = _sampler(
        config, student_side, vocabulary, pad_id, source="student", model=model, autocast=student.autocast
    )
    off_policy = (
        _sampler(config, teacher_side, vocabulary, pad_id, source="teacher", student_renderer=student_side.renderer)
        if config.rollout.off_policy == "teacher"
        else DatasetResponses(student_side.renderer, config.rollout.max_new_tokens, eos_ids=student_side.eos)
    )
    return Parts(
        student=student,
        student_sampler=student_sampler,
        sampler=MixedSampler(student_sampler, off_policy if config.rollout.lmbda < 1 else None, config.rollout.lmbda),
        teacher=teacher,
        teacher_sampler=_sampler(config, teacher_side, vocabulary, pad_id, source="teacher"),
        teacher_policy=Policy(
            teacher_side.model, vocabulary=vocabulary, eos_ids=teacher_side.eos, teacher_logits=teacher.logits
        ),
        order=PromptOrder(prompts, seed=derive_seed(config.seed, 0, "prompts"), shuffle=config.prompts.shuffle),
        evaluator=_evaluator(config, held_out, teacher, pad_id) if held_out else None,
        tokenizer=student_side.tokenizer,
        renderer=student_side.renderer,
        pad_id=pad_id,
        fingerprints=fingerprints,
        warnings=(*vocabulary.warnings, *notices(config)),
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


def _evaluator(config: Config, held_out: list[Prompt], teacher: LocalTeacher, pad_id: int) -> Evaluator:
    return Evaluator(
        prompts=held_out,
        samples_per_prompt=config.eval.samples_per_prompt,
        reward=load_reward(config.eval.reward),
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


def _match_teacher(config: Config, teacher: LocalTeacher) -> None:
    try:
        teacher.serve(config.objective)
    except ObjectiveError as error:
        if config.teacher.supply == "auto":
            raise
        raise ObjectiveError(
            f"{error} (teacher.supply={config.teacher.supply} is what limits it; teacher.supply=auto lifts that.)"
        ) from None
