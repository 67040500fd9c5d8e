"""Checks of a run's models: vocabularies, attention, adapters. Needs no verl."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from opd.errors import ConfigError, ModelError, OpdError
from opd.integrations.verl.plugin.settings import Settings, TeacherSettings
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies

UNREADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError)
"""Raised by transformers for a folder that is incomplete, damaged or of another kind."""


NO_ADAPTER = (
    "opd.teacher.source=adapter_off, but the student has no LoRA adapter; set actor_rollout_ref.model.lora_rank, or give a teacher with "
    "opd.teacher.model."
)
DEFAULT_ATTENTION = "flash_attention_2"  # verl's, where the model's override_config does not say
FLOAT32 = ("fp32", "float32", "32", 32)
"""verl's names of it."""


def teacher_attention(
    settings: TeacherSettings, *, student: str | None, precision: Any, sequence_parallel: int
) -> str | None:
    """The attention that the teacher is loaded with; None is verl's default, FlashAttention 2. Raises ConfigError.

    `student` is the student's, None where it has verl's default; `precision` is verl's name of what the teacher computes in.
    """
    inherited = student or DEFAULT_ATTENTION
    asked = settings.attn_implementation or inherited
    is_flash = "flash" in asked
    if is_flash and precision in FLOAT32:
        if settings.attn_implementation is not None:
            raise ConfigError(
                f"opd.teacher.attn_implementation={asked} takes bfloat16 and float16, and the teacher computes in float32; drop it, and "
                "the teacher uses sdpa, or set opd.teacher.dtype=bfloat16."
            )
        if sequence_parallel > 1:
            raise ConfigError(
                f"ulysses_sequence_parallel_size={sequence_parallel} works inside FlashAttention, which takes bfloat16 and float16, and the "
                "teacher computes in float32; set opd.teacher.dtype=bfloat16, or the size to 1."
            )
        return "sdpa"
    if sequence_parallel > 1 and not is_flash and not asked.startswith("ulysses"):
        raise ConfigError(
            f"ulysses_sequence_parallel_size={sequence_parallel} works inside FlashAttention, and the teacher has {asked}, which would "
            "see one part of each sequence; set opd.teacher.attn_implementation=flash_attention_2, or the size to 1."
        )
    return settings.attn_implementation or student


def check_top_k(settings: Settings, match: VocabularyMatch) -> None:
    """Raise ConfigError for a support that is larger than the vocabulary."""
    objective = settings.objective
    if objective.top_k is not None and objective.top_k > match.size:
        full = "" if settings.is_served else ", or use opd.objective.support=full"
        raise ConfigError(
            f"opd.objective.top_k={objective.top_k} is more than the {match.size} tokens of the vocabulary; lower it{full}."
        )


class TokenizedModel(Protocol):
    """The parts of a model that say which token ids it owns. verl's HFModelConfig has them."""

    path: str
    hf_config: Any
    tokenizer: Any


@dataclass(kw_only=True)
class ModelFolder:
    """Config and tokenizer of a folder."""

    path: str
    hf_config: Any
    tokenizer: Any


def common_vocabulary(student: TokenizedModel, teacher: TokenizedModel) -> VocabularyMatch:
    """The token ids that both models own. Raises VocabularyError that shows where the two part."""
    return check_vocabularies(
        student.tokenizer,
        teacher.tokenizer,
        student.hf_config.get_text_config().vocab_size,
        teacher.hf_config.get_text_config().vocab_size,
        student_name=student.path,
        teacher_name=teacher.path,
    )


def read_model(path: str, trust_remote_code: bool, key: str) -> ModelFolder:
    """Config and tokenizer of a folder; no weight is read. Raises ModelError that names the folder by its `key`."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config, tokenizer = (
            kind.from_pretrained(path, trust_remote_code=trust_remote_code) for kind in (AutoConfig, AutoTokenizer)
        )
    except UNREADABLE as error:
        if isinstance(error, OpdError):
            raise
        raise unreadable(f"{key}='{path}'", error) from error
    return ModelFolder(path=path, hf_config=config, tokenizer=tokenizer)


def unreadable(what: str, error: Exception, more: str = "") -> ModelError:
    """For a model that transformers does not read; `more` is something else that went wrong."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    also = f" {more.rstrip('.')}." if more else ""
    return ModelError(
        f"{what} cannot be read: {reason}.{also} Give a folder with config.json, weights and tokenizer, or a hub name this machine can "
        "reach."
    )


def end_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The ids that end a response, for the metric eos_prob."""
    ends: Collection[Any] = [tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)]
    return tuple(sorted({i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}))
