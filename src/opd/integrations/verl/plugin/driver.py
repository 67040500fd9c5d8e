"""Checks of a run's models on the driver, before Ray starts. They are read as verl's workers will read them."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.fs import copy_to_local
from verl.utils.import_utils import import_external_libs
from verl.workers.config import FSDPEngineConfig, HFModelConfig

from opd.errors import ConfigError, ModelError, OpdError, require
from opd.integrations.verl.plugin.head import output_layer, run_to_head
from opd.integrations.verl.plugin.model_checks import (
    NO_ADAPTER,
    NOT_BUILT,
    common_vocabulary,
    read_model,
    shrink,
    teacher_attention,
    unreadable,
)
from opd.integrations.verl.plugin.settings import Settings, key_of
from opd.integrations.verl.plugin.teachers.in_actor import precision_of

STUDENT = "actor_rollout_ref.model"


def check_models(settings: Settings, model: DictConfig, engine: FSDPEngineConfig) -> None:
    """Raise an OpdError for models that cannot be distilled as the settings say; prints warnings.

    `model` is the section actor_rollout_ref.model, and `engine` the actor's. No weight is read.
    """
    if any(one.is_student for one in settings.all_teachers.values()) and not model.get("lora_rank"):
        raise ConfigError(NO_ADAPTER)
    student = read_student(model)
    refuse_changed_logits(student.hf_config, f"student {STUDENT}.path='{student.path}'")
    for name, one in settings.all_teachers.items():
        if one.is_student:
            continue
        key = f"{key_of(name)}.model"
        teacher = replace(read_model(copy_to_local(one.model), one.trust_remote_code, key), path=one.model)
        match = common_vocabulary(student, teacher)
        top_k, full = settings.objective.top_k, "" if settings.is_served else ", or use opd.objective.support=full"
        require(
            top_k is None or top_k <= match.size,
            f"opd.objective.top_k={top_k} is more than the {match.size} tokens of the vocabulary; lower it{full}.",
        )
        for warning in match.warnings:
            print(f"opd: warning: {warning}", flush=True)
        if settings.placement != "pool":
            refuse_changed_logits(teacher.hf_config, f"teacher {key}='{one.model}'")
        if settings.placement == "actor":
            teacher_attention(
                one,
                student=student.override_config.get("attn_implementation"),
                precision=precision_of(one, engine),
                sequence_parallel=engine.ulysses_sequence_parallel_size,
            )


def read_student(model: DictConfig) -> HFModelConfig:
    """verl's own reading: tokenizer_path, hf_config_path, override_config, and what external_lib registers. Raises ModelError."""
    section: dict[str, Any] = OmegaConf.to_container(model, resolve=True)  # pyright: ignore[reportAssignmentType]
    library = section.get("external_lib")
    reason = ""
    try:
        import_external_libs(library)
    except OpdError:
        raise
    except Exception as error:  # anything, of somebody else's module; a driver without a GPU may do without it
        reason = f"{STUDENT}.external_lib={library} cannot be imported here: {type(error).__name__}: {error}"
        print(f"opd: warning: {reason}", flush=True)
    try:
        return omega_conf_to_dataclass({**section, "external_lib": None, "use_shm": False})
    except InstantiationException as error:  # Hydra's, around whatever transformers raised
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        path = section["path"]
        others = [f"{name}='{section[name]}'" for name in ("tokenizer_path", "hf_config_path") if section.get(name)]
        beside = f" with {' and '.join(others)}" if others else ""
        raise unreadable(f"{STUDENT}.path='{path}'{beside}", cause, more=reason) from error


def refuse_changed_logits(config: Any, who: str) -> None:
    """Raise ModelError for a class of model whose logits are not a product of its last hidden states, by running a small one.

    Nothing is said of a class that cannot be built so; the first step looks at the model itself.
    """
    try:
        small = _without_layers(config.get_text_config())
    except NOT_BUILT:
        return
    output_layer(small, who)

    def at_head(hidden: torch.Tensor, _layer: Any) -> torch.Tensor:
        return hidden.new_zeros(1)

    try:
        with torch.no_grad():
            run_to_head(small, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, at_head, who)
    except ModelError:
        raise
    except NOT_BUILT:
        return


def _without_layers(config: Any) -> nn.Module:
    """Embedding, norm and output layer of a small model of this class, and whatever it does to its logits. Its weights are arbitrary."""
    small = shrink(config, config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    stacks = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == small.num_hidden_layers
    ]
    for module, name in stacks:
        setattr(module, name, nn.ModuleList())
    return model.to_empty(device="cpu")
