"""Checks of a run's models: vocabularies, attention, adapters; and small models of the same class. Needs no verl."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from opd.errors import ConfigError, ModelError, OpdError
from opd.integrations.verl.plugin.settings import TeacherSettings
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


@dataclass(kw_only=True)
class ModelFolder:
    """Config and tokenizer of a folder: the parts of verl's HFModelConfig that say which token ids a model owns."""

    path: str
    hf_config: Any
    tokenizer: Any


def common_vocabulary(student: Any, teacher: Any) -> VocabularyMatch:
    """The token ids that both models own; each is a ModelFolder, or verl's HFModelConfig. Raises VocabularyError that shows where the two part."""
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


SIZES = {
    name: most
    for most, names in {
        64: "hidden_size",
        2: "num_hidden_layers num_experts_per_tok max_window_layers",
        4: "num_attention_heads num_experts num_local_experts n_routed_experts",
        128: "intermediate_size n_inner ffn_dim",
        32: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank",
        16: "head_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
        1: "n_group topk_group first_k_dense_replace",
    }.items()
    for name in names.split()
}
"""No larger than this in a stand-in, by the names of transformers' config classes."""
PER_LAYER = ("layer_types", "mlp_layer_types")
LEFT_OUT = ("quantization_config", "auto_map", "dtype", "torch_dtype")
INITIALIZER_RANGE = 0.2  # distributions far from uniform, and from each other, so that a loss has something to show
MOST_PARAMETERS = 60_000_000  # a vocabulary of 262 144 tokens, twice 64 wide, is half of it
NOT_BUILT = Exception
"""Raised for a model that cannot be read, or made this small: anything, by classes and validators of other people."""


def small_model(config: Any, rows: int, seed: int) -> Any:
    """A model of this class that was seen to run, or why there is none."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(shrink(config, rows), dtype=torch.float32).eval()
            logits = model(input_ids=torch.arange(4)[None] % rows, use_cache=False).logits
    except NOT_BUILT as error:
        return in_short(error)
    if logits.shape[-1] != rows or not logits.isfinite().all():
        return "its logits are not finite"
    size = sum(parameter.numel() for parameter in model.parameters())
    return model if size <= MOST_PARAMETERS else f"{size / 1e6:.0f} M parameters"


def shrink(config: Any, rows: int) -> Any:
    """The same class and kinds of layer; few and narrow layers, and `rows` tokens."""
    old = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}
    new = {**old, "vocab_size": rows}
    for name, most in SIZES.items():
        name = config.attribute_map.get(name, name)
        value = old.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            new[name] = min(value, most)
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if "num_key_value_heads" in old and groups is not None:
        new["num_key_value_heads"] = 1 if groups == 1 else 4 if groups == heads else 2
    for name in PER_LAYER:
        if isinstance(old.get(name), list) and old[name]:
            layers = min(len(old[name]), SIZES["num_hidden_layers"])
            kinds = list(dict.fromkeys(old[name]))[:layers]
            new[name] = (kinds * layers)[:layers]
    if "initializer_range" in old:
        new["initializer_range"] = INITIALIZER_RANGE
    return type(config).from_dict(new)


def in_short(error: Exception) -> str:
    if isinstance(error, OSError):
        return "no config and tokenizer on this disk"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
