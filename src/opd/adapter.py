"""Adapter folders as models. peft loads every kind into its base, also parts that transformers' own loader leaves random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM
from transformers.utils.peft_utils import find_adapter_config_file

from opd.errors import MissingDependencyError, ModelError
from opd.folders import is_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""Prefix of a weight's name in peft."""


def is_adapter(name: str, revision: str | None = None) -> bool:
    """True for a local folder or a hub name with an adapter_config.json."""
    return find_adapter_config_file(name, revision=revision) is not None


def base_of(name: str) -> str | None:
    """The base that a local adapter folder names; None for other folders and for hub names."""
    file = Path(name, "adapter_config.json")
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ModelError(f"'{file}' cannot be read: {error}. Get the adapter's folder again.") from error


def check_base(base: str, name: str, role: str) -> None:
    """Raise ModelError where the base that an adapter names is a folder that is not there."""
    if not Path(base).is_dir() and is_path(base):
        raise ModelError(
            f"The {role} '{name}' is an adapter of '{base}' (base_model_name_or_path in its adapter_config.json), and there is no such "
            f"folder. Put the base's path there, or give {role}.model a merged folder (peft's merge_and_unload)."
        )


def load_adapter(name: str, *, revision: str | None, role: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The base with the adapter in it, and the names of weights missing from the files. `options` go to from_pretrained.

    LoRA matrices stay beside their layer. Trained copies of whole modules (modules_to_save) and of token rows
    (trainable_token_indices) replace the base's. Raises ModelError for adapters that are prompts, not weights.
    """
    try:
        from peft import PeftConfig, PeftModel
        from peft.utils import load_peft_weights
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        raise MissingDependencyError(
            f"The {role} '{name}' is an adapter, which needs peft, and that is not installed: pip install 'opd[peft]'."
        ) from None
    config = PeftConfig.from_pretrained(name, revision=revision)
    if config.is_prompt_learning:
        raise ModelError(
            f"The {role} '{name}' is an adapter of the kind {getattr(config.peft_type, 'value', config.peft_type)}, which adds trained vectors to every prompt and cannot "
            f"be part of a model's weights. Give {role}.model a LoRA adapter or a whole model."
        )
    base, lacking = _load_base(str(config.base_model_name_or_path), name, role, revision=config.revision, **options)
    weights = load_peft_weights(name, device="cpu", revision=revision)
    _add_token_rows(base, weights)
    adapted = PeftModel.from_pretrained(base, name, revision=revision)
    missing = lacking + sorted(adapted.load_adapter(name, "default", revision=revision).missing_keys)
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in adapted.modules()):
        return adapted.merge_and_unload(), missing  # pyright: ignore[reportReturnType]  # the base, a PreTrainedModel
    return adapted.get_base_model(), missing  # pyright: ignore[reportReturnType]


def _load_base(base: str, name: str, role: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    check_base(base, name, role)
    model, loading = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, **options)  # pyright: ignore[reportGeneralTypeIssues]
    return model, sorted(loading["missing_keys"])


def _add_token_rows(base: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Resize the base for an adapter trained with added tokens, whose embeddings have more rows."""
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    names = {name for name, module in base.named_modules() if any(module is end for end in ends)}
    rows = [
        tensor.shape[0]
        for key, tensor in weights.items()
        if key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer") in names
    ]
    if rows and max(rows) != base.get_input_embeddings().weight.shape[0]:  # pyright: ignore[reportIndexIssue]  # a tensor's
        base.resize_token_embeddings(max(rows), mean_resizing=False)  # all of them are overwritten
