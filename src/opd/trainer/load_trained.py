"""A model that somebody names, outside of a run: as it is stored, or with the weights of a checkpoint in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.config.run import RunSettings
from opd.models import is_adapter, load_causal_lm, resolve_device, resolve_dtype
from opd.reporting.loading import Loading
from opd.seeding import derive_seed
from opd.tokenizer import load_tokenizer
from opd.trainer.checkpoint import load_trained_weights
from opd.trainer.load_models import GivenModel, LoadedModel, load_model
from opd.trainer.lora import add_lora


def load_trained(settings: RunSettings, checkpoint: Path | None, loading: Loading) -> LoadedModel:
    """The student of a recipe, which may also be a LoRA adapter, to be used or saved; with a checkpoint's weights it is a peft model where
    the recipe has student.lora. Raises ModelError, or RunFolderError for a checkpoint that does not fit."""
    section = settings.student
    given = adapter_student(settings, loading) if checkpoint is None else None
    loaded = load_model(section, "student", settings.prompts, device=section.device, given=given, loading=loading)
    if checkpoint is None:
        return loaded
    model: Any = loaded.model
    if section.lora is not None:
        model = add_lora(model, section.lora, seed=derive_seed(settings.seed, 0, "lora"))
    load_trained_weights(checkpoint, model)
    return replace(loaded, model=model)


def adapter_student(settings: RunSettings, loading: Loading) -> GivenModel | None:
    """The student in its base, where it is a LoRA adapter, which no run would take; None for a whole model."""
    section = settings.student
    if not is_adapter(section.model, section.revision):
        return None
    device = resolve_device(section.device)
    dtype = resolve_dtype(section.dtype, device)
    loading.begin(f"loading adapter '{section.model}' in {str(dtype).removeprefix('torch.')} on {device}")
    options: Mapping[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    model = load_causal_lm(
        section.model, dtype=dtype, device=device, attn_implementation=section.attn_implementation, **options
    )
    for parameter in model.parameters():  # a student has an optimizer, which takes no step here
        parameter.requires_grad_(parameter.is_floating_point())
    return GivenModel(model=model, tokenizer=load_tokenizer(section.model, **options))
