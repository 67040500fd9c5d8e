"""Trainable low-rank adapters on a frozen student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from opd.errors import ConfigError, MissingDependencyError
from opd.seeding import seeded

if TYPE_CHECKING:
    from opd.config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PreTrainedModel:
    """The model with trainable low-rank adapters and everything else frozen; their first weights are a function of the seed.

    Raises MissingDependencyError without peft, and ConfigError for adapters on tied embeddings: merging one end would change the other.
    """
    try:
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model
    except ImportError:
        raise MissingDependencyError(
            "student.lora needs peft, which is not installed: pip install 'opd[peft]'."
        ) from None
    targets = config.target_modules
    names: str | list[str] = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    assert config.alpha is not None  # the config fills it in
    lora = PeftLora(
        r=config.rank, lora_alpha=config.alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    with seeded(seed, model.device):
        adapted = get_peft_model(model, lora)
    if tied and any(getattr(module, "base_layer", None) in ends for module in adapted.modules()):
        raise ConfigError(
            f"student.lora.target_modules='{targets}' puts adapters on the embeddings or the head, which share one matrix in this "
            "model: merged into it, they would change both ends. Leave them out, e.g. student.lora.target_modules=all-linear."
        )
    return adapted  # pyright: ignore[reportReturnType]
